"""The cost of a model, computed before training."""
