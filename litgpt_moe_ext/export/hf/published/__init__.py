"""Checkpoints that others have published: a `config.json`, and weights in any supported storage format."""
