"""Tiny model configurations shared by the tests."""

from typing import Any

import pytest
import torch
from litgpt import GPT, Config

# torch 2.10, the oldest that the package takes, has none, and the setting is refused there in one line.
HAS_FUSED_LOSS = hasattr(torch.nn.functional, "linear_cross_entropy")
needs_fused_loss = pytest.mark.skipif(not HAS_FUSED_LOSS, reason="this torch has no linear_cross_entropy")


def moe_config(**changes: Any) -> Config:
    """Return the configuration of a model of a few thousand parameters with `SharedExpertMoE`."""
    settings = {
        "name": "tiny",
        "block_size": 32,
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 4,
        "n_query_groups": 2,
        "vocab_size": 64,
        "padded_vocab_size": 64,
        "norm_class_name": "RMSNorm",
        "bias": False,
        "parallel_residual": False,
        "rotary_percentage": 1.0,
        "mlp_class_name": "SharedExpertMoE",
        "n_expert": 8,
        "n_expert_per_token": 2,
        "moe_intermediate_size": 12,
    }
    return Config(**{**settings, **changes})


def noisy_config(**changes: Any) -> Config:
    """Return the same with `NoisyTopKMoE`."""
    return moe_config(mlp_class_name="NoisyTopKMoE", **changes)


def dense_config(**changes: Any) -> Config:
    """Return the same with LitGPT's dense layers, without any of the plugin's classes."""
    dense = {"mlp_class_name": "LLaMAMLP", "n_expert": 0, "n_expert_per_token": 0, "moe_intermediate_size": None}
    return moe_config(**{**dense, "intermediate_size": 24, **changes})


def attention_config(**changes: Any) -> Config:
    """Return the configuration of a two-layer model with grouped queries and `SinkAttention`."""
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
    return Config(**{**settings, **changes})


def randomize(module: torch.nn.Module, std: float = 0.5) -> torch.nn.Module:
    """Fill all parameters with normal random numbers."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def initialized_model(config: Config) -> GPT:
    """Return a model initialised as `litgpt pretrain` initialises it."""
    import lightning as L
    from litgpt.pretrain import initialize_weights

    fabric = L.Fabric(devices=1, accelerator="cpu")
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    return model
