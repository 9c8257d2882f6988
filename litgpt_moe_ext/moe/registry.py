"""The routers, auxiliary losses and activations that a configuration can name, as plain data.

To add one, add an entry here; other packages add theirs with `litgpt_moe_ext.extend`. Functions and classes are named
by import path, so that checking a configuration does not import torch; other packages may give the object itself.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RouterType:
    """A kind of router: `router_type` in a configuration.

    Attributes:
        router: The subclass of `litgpt_moe_ext.moe.routing.router.Router`, or its import path.
        doc: How it chooses experts, for tables.
        features: What it has; fields and losses that need a missing feature are refused. Any name is allowed; these
            mean something to the package:

            - `logits`: a linear gate; `Choice.logits_TE` is set and the gate values are differentiable.
            - `noise`: `Choice.noisy_TE` and `Choice.std_TE` are set in training.
            - `score_function`, `norm_topk_prob`, `groups`, `bias`: reads the fields of that name.
            - `sums_to_one`: the gate values of a token always sum to 1.
            - `copies`: experts with equal rows in the gate are chosen together.
            - `softmax_of_chosen`: in evaluation, gate values are the softmax of the highest logits.
            - `token_ids`: `choose` and `given` take `litgpt_moe_ext.moe.batch_metadata.TokenIds` after hidden states.
        defaults: Defaults of fields that differ from those in the table of fields.
    """

    router: str | type
    doc: str
    features: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """An auxiliary loss. The field `router_NAME_coef` of a configuration is its weight.

    Attributes:
        function: Returns the loss without its weight, a scalar; or its import path.
        inputs: What the function is given, by name: attributes of `litgpt_moe_ext.moe.routing.router.Choice` and of the
            router, `probabilities_TE`, `n_sequence`, and `real_T`: which tokens are not padding, or None if all.
            Without `real_T` the function is given real tokens only, and selecting them waits for the GPU.
        doc: What it does, for tables.
        needs: Features that the router must have.
    """

    function: str | Callable[..., Any]
    inputs: tuple[str, ...]
    doc: str
    needs: tuple[str, ...] = ("logits",)


@dataclass(frozen=True)
class ActivationType:
    """An activation function: `mlp_activation` in a configuration.

    Attributes:
        function: A `litgpt_moe_ext.moe.activations.Pointwise`, or its import path.
        gated: Whether it gates a second projection: `f(gate(x)) * up(x)` (arXiv:2002.05202).
        up: Applied to the up projection first, given as `function` is; None for nothing.
        tanh: Replaces `function` under `gelu_approximate: tanh`; None to keep it.
    """

    function: Any
    gated: bool = False
    tanh: Any = None
    up: Any = None


ROUTERS: dict[str, RouterType] = {
    "topk": RouterType(
        "litgpt_moe_ext.moe.routing.learned_routers.TopKRouter",
        "highest scores, balanced by a bias (DeepSeek-V3)",
        frozenset({"logits", "score_function", "norm_topk_prob", "groups", "bias", "copies"}),
    ),
    "noisy_topk": RouterType(
        "litgpt_moe_ext.moe.routing.learned_routers.NoisyTopKRouter",
        "highest logits with learned noise, balanced by losses (Shazeer et al. 2017)",
        frozenset({"logits", "noise", "sums_to_one", "softmax_of_chosen"}),
        {"router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1},
    ),
    "hash": RouterType(
        "litgpt_moe_ext.moe.routing.fixed_routers.HashRouter",
        "by token id, does not learn",
        frozenset({"token_ids", "sums_to_one"}),
    ),
    "uniform": RouterType(
        "litgpt_moe_ext.moe.routing.fixed_routers.UniformRouter",
        "at random, does not learn",
        frozenset({"token_ids", "sums_to_one"}),
    ),
}

LOSSES: dict[str, Loss] = {
    "load_balancing_loss": Loss(
        "litgpt_moe_ext.moe.balancing.losses.load_balancing_loss",
        ("probabilities_TE", "experts_TK", "real_T"),
        "Switch Transformer's balancing loss, over `router_load_balancing_loss_scope`",
    ),
    "sequence_balancing_loss": Loss(
        "litgpt_moe_ext.moe.balancing.losses.sequence_balancing_loss",
        ("probabilities_TE", "experts_TK", "n_sequence", "real_T"),
        "DeepSeek-V3's balancing loss per sequence",
    ),
    "z_loss": Loss(
        "litgpt_moe_ext.moe.balancing.losses.router_z_loss",
        ("logits_TE", "real_T"),
        "ST-MoE's z-loss, which keeps logits small",
    ),
    "importance_loss": Loss(
        "litgpt_moe_ext.moe.balancing.losses.importance_loss",
        ("weights_TK", "experts_TK", "n_expert", "real_T"),
        "Shazeer's balancing loss on gate values",
    ),
    "load_loss": Loss(
        "litgpt_moe_ext.moe.balancing.losses.load_loss",
        ("logits_TE", "noisy_TE", "std_TE", "top_k", "real_T"),
        "Shazeer's balancing loss on expected tokens",
        ("logits", "noise", "choice"),
    ),
    "orthogonality_loss": Loss(
        "litgpt_moe_ext.moe.balancing.losses.orthogonality_loss",
        ("weight", "real_T"),
        "ERNIE 4.5's orthogonality loss on the experts' directions in the router",
    ),
}

ACTIVATIONS: dict[str, ActivationType] = {
    "swiglu": ActivationType("litgpt_moe_ext.moe.activations.SILU", gated=True),
    "clamped_swiglu": ActivationType(
        "litgpt_moe_ext.moe.activations.CLAMPED_SILU", gated=True, up="litgpt_moe_ext.moe.activations.CLAMPED_PLUS_ONE"
    ),
    "geglu": ActivationType(
        "litgpt_moe_ext.moe.activations.GELU", gated=True, tanh="litgpt_moe_ext.moe.activations.GELU_TANH"
    ),
    "gelu": ActivationType("litgpt_moe_ext.moe.activations.GELU", tanh="litgpt_moe_ext.moe.activations.GELU_TANH"),
    "relu": ActivationType("litgpt_moe_ext.moe.activations.RELU"),
    "relu2": ActivationType("litgpt_moe_ext.moe.activations.SQUARED_RELU"),
}

# Names of expert backends (`litgpt_moe_ext.moe.kernels.registry`); registering a backend adds its name.
EXPERT_BACKENDS = ["loop", "grouped_cpu", "grouped_mm", "triton"]


def loss_field(name: str) -> str:
    """Return the configuration field that holds the weight of the loss `name`."""
    return f"router_{name}_coef"


def load(entry: Any) -> Any:
    """Return the entry of a registry, imported if it is an import path."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)
