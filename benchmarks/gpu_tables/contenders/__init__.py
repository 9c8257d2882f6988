"""Contenders of more than one table: layers, recipes and the training of their models."""
