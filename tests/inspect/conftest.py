"""Checkpoints are those of the evaluation's tests."""

from tests.evaluation.conftest import llama_dir, moe_dir

__all__ = ["llama_dir", "moe_dir"]
