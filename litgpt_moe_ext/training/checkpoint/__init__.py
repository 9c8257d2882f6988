"""Checkpoints: saved whole or not at all, found again, resumed."""
