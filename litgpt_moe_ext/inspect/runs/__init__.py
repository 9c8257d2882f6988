"""Training runs from their logs."""
