"""Reading and drawing training runs from their logs."""
