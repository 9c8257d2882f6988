"""Checkpoints: saving them whole or not at all, finding them, resuming from them."""
