"""Corpora on disk: finished and unfinished ones, checks for damage, and copies of them as W&B artifacts."""
