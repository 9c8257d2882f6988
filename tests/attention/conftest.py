"""Tiny model configurations for the attention tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from litgpt import Config

import litgpt_moe_ext


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    litgpt_moe_ext.register()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_config(_registered: None) -> Callable[..., Config]:
    """Build a two-layer configuration with grouped queries that names `SinkAttention`; keywords override."""

    def build(**overrides: Any) -> Config:
        settings = {
            "n_layer": 2,
            "n_head": 4,
            "n_query_groups": 2,
            "n_embd": 24,
            "head_size": 8,
            "block_size": 32,
            "padded_vocab_size": 40,
            "rotary_percentage": 1.0,
            "parallel_residual": False,
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
            "intermediate_size": 16,
            "attention_class_name": "SinkAttention",
        }
        return Config(**{**settings, **overrides})

    return build
