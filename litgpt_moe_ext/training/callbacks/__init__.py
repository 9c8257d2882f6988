"""What hangs on the training loop: one class, one job each."""
