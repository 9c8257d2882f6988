"""What a step is made of: its micro-batches, its loss, and the validation that judges it."""
