"""What a model has, according to its configuration: the conditions under which fields are read.

Imports neither torch nor LitGPT.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from litgpt_moe_ext.moe.registry import ACTIVATIONS, ROUTERS, RouterType

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# The MoE classes with the router that each has unless `router_type` says otherwise, and the dense class.
MOE_CLASS_NAMES: dict[str, str] = {"MoE": "topk", "SharedExpertMoE": "topk", "NoisyTopKMoE": "noisy_topk"}
MLP_CLASS_NAMES = (*MOE_CLASS_NAMES, "FeedForward")
# LitGPT's own dense classes, and the `mlp_activation` of `FeedForward` that computes the same.
LITGPT_ACTIVATIONS = {"LLaMAMLP": "swiglu", "GemmaMLP": "geglu", "GptNeoxMLP": "gelu"}
ATTENTION_CLASS_NAMES = ("SinkAttention",)

# Condition of each feature, and why a field that needs it would be ignored without it.
_FEATURES: dict[str, "tuple[Callable[[Config], bool], str]"] = {
    "feed_forward": (
        lambda config: config.mlp_class_name in MLP_CLASS_NAMES,
        "mlp_class_name: {mlp_class_name} has no such setting",
    ),
    "moe": (
        lambda config: config.mlp_class_name in MOE_CLASS_NAMES,
        "mlp_class_name: {mlp_class_name} is a dense layer",
    ),
    "gelu": (
        lambda config: config.mlp_activation in ACTIVATIONS and ACTIVATIONS[config.mlp_activation].tanh is not None,
        "mlp_activation is {mlp_activation}",
    ),
    "shared_experts": (lambda config: bool(config.n_shared_expert), "n_shared_expert is not set"),
    "expert_groups": (lambda config: config.n_expert_groups is not None, "n_expert_groups is not set"),
    "choice": (lambda config: config.n_expert_per_token != config.n_expert, "every token visits every expert"),
    "moving_bias": (lambda config: bool(config.router_bias_update_rate), "router_bias_update_rate is 0"),
    "load_balancing_loss": (
        lambda config: bool(config.router_load_balancing_loss_coef),
        "router_load_balancing_loss_coef is not set",
    ),
    "attention": (
        lambda config: config.attention_class_name is not None,
        "attention_class_name is not set to SinkAttention, which has it",
    ),
    "sinks": (lambda config: config.attention_sinks is not False, "attention_sinks is false"),
    "documents": (
        lambda config: config.attention_document_boundary is not None,
        "attention_document_boundary is not set to eos or bos",
    ),
}

# The same for the features of routers (`RouterType.features`).
_ROUTER_LACKS = {
    "logits": "does not learn",
    "noise": "has no noise",
    "bias": "has no balancing bias",
    "groups": "chooses without groups",
    "score_function": "has no choice of scores",
    "norm_topk_prob": "has gate values that sum to 1 anyway",
}


def missing_feature(config: "Config", owner: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the first feature in `owner` that a model lacks and why its fields would be ignored; None if it has all.

    Args:
        config: The model configuration.
        owner: Names of features; those on which others depend come first.
    """
    for feature in owner:
        if feature in _FEATURES:
            has, reason = _FEATURES[feature]
            if not has(config):
                return feature, reason.format_map(vars(config))
        elif feature not in router_type_of(config).features:
            return feature, f"router_type: {config.router_type} {_ROUTER_LACKS.get(feature, f'has no {feature}')}"
    return None


def router_type_of(config: "Config") -> RouterType:
    """Return the registry's entry for the router of a model with MoE layers."""
    return ROUTERS[config.router_type]


def routers_need(config: "Config", feature: str) -> bool:
    """Return whether a model has MoE layers of this package, and their routers have `feature`."""
    return config.mlp_class_name in MOE_CLASS_NAMES and feature in router_type_of(config).features


def is_dense_layer(config: "Config", block_idx: int) -> bool:
    """Return whether block `block_idx` of a model with MoE layers has a dense layer in its place."""
    if config.mlp_class_name not in MOE_CLASS_NAMES:
        return False
    if block_idx in (config.mlp_only_layers or ()):
        return True
    index = block_idx - (config.first_k_dense_replace or 0)
    return index < 0 or bool((index + 1) % (config.decoder_sparse_step or 1))


def has_experts(config: "Config", block_idx: int) -> bool:
    """Return whether block `block_idx` has an MoE layer of this package."""
    return config.mlp_class_name in MOE_CLASS_NAMES and not is_dense_layer(config, block_idx)


def has_sinks(config: "Config", block_idx: int) -> bool:
    """Return whether the attention of block `block_idx` has sinks."""
    sinks = getattr(config, "attention_sinks", None)
    return sinks[block_idx] if isinstance(sinks, list) else sinks is not False


def family_of_norms(norm_class_name: str, name: str) -> str:
    """Return the word in a model's name that makes LitGPT change the norms of a class; empty if there is none.

    Gemma's add 1 to their weights, OLMo's have no weights.

    Args:
        norm_class_name: The class.
        name: The model's name.
    """
    word = {"RMSNorm": "Gemma", "LayerNorm": "OLMo"}.get(norm_class_name, "")
    return word if word in name else ""


def changes_model(config: "Config") -> bool:
    """Return whether a configuration has settings that affect a model beyond its attention layers."""
    return config.attention_class_name is not None and (
        config.position_embedding is not None
        or bool(config.embedding_dropout)
        or config.attention_document_boundary is not None
        or config.streaming_cache_window is not None
    )
