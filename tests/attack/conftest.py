"""The small recipe of the training tests."""

from tests.training.conftest import corpus_settings, recipe

__all__ = ["corpus_settings", "recipe"]
