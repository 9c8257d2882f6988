"""A model described by the properties that distinguish the classes of other libraries."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.attention.rope import rope_frequencies
from litgpt_moe_ext.config.features import MLP_CLASS_NAMES, MOE_CLASS_NAMES, family_of_norms, has_sinks, is_dense_layer
from litgpt_moe_ext.config.rope import present_adjustments, rope_kind
from litgpt_moe_ext.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt_moe_ext.config.types import Config

# Settings of litgpt.Config that no exported model can have, with the value that turns each off.
_UNSUPPORTED: dict[str, Any] = {
    "parallel_residual": False,
    "shared_attention_norm": False,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "norm_1": True,
    "norm_2": True,
    "scale_embeddings": False,
    "final_logit_softcapping": None,
    "attention_logit_softcapping": None,
    "rope_local_base_freq": None,
    "rope_condense_ratio": 1,
}
# Settings that exports leave out and that change nothing within one text, with the effect of leaving them out.
_LEFT_OUT = {
    "attention_document_boundary": "tokens see across the ends of documents; within one they see the same",
    "streaming_cache_window": "generation keeps all tokens in its cache",
}
# The epsilon of transformers' norms inside latent attention, whatever that of the other norms.
DEEPSEEK_EPS = 1e-6
_DENSE = ("FeedForward", "LLaMAMLP", "GptNeoxMLP")
_ROUTERS = ("topk", "noisy_topk")
# This package's own; an extension's has no code in an export.
_ACTIVATIONS = ("swiglu", "clamped_swiglu", "geglu", "gelu", "relu", "relu2")


@dataclass(frozen=True)
class Facts:
    """The properties by which architectures are compared; each has one of few values.

    Attributes:
        config: The model's configuration, for sizes.
        attention: `grouped` or `latent` (DeepSeek).
        latent_norm_eps: Whether the norms inside latent attention have DeepSeek's epsilon; true without such norms.
        scaled_by_yarn: Whether YaRN multiplies the scores of latent attention (`mscale_all_dim`).
        layers: `dense`, `moe`, or `mixed` (dense layers at the start), or `alternating`.
        norm: `rms` or `layer`.
        positions: `rotary`, `partial_rotary` or `learned`.
        rope: `default`, `linear`, `llama3` or `yarn`.
        yarn_rounds: Whether the ends of YaRN's ramp are rounded to whole numbers; true without YaRN.
        rope_layout: `half` or `interleaved`.
        sinks: `none`, `all` or `some` (of the layers).
        window: `none`, `all` or `some`.
        clipped: Whether queries, keys and values are clipped.
        qk_norm: `none`, `head` or `whole` (over all heads together).
        attention_bias: `none`, `qkv` or `all`.
        grouped: Whether key/value heads are fewer than query heads.
        free_head_size: Whether heads do not split the model width evenly.
        activation: `swiglu`, `clamped_swiglu`, `geglu`, `gelu`, `gelu_tanh`, `relu` or `relu2`.
        mlp_bias: Whether feed-forward layers have biases.
        router: `none`, `topk` or `noisy_topk`.
        score: `none`, `sigmoid` or `softmax`.
        gate_on_input: Whether gate values multiply the experts' input.
        router_bias: Whether the gate has a learned bias.
        norm_topk: Whether weights of the chosen experts sum to 1.
        balancing_bias: Whether the router has a balancing bias that differs between experts.
        groups: `none`, `best_one` or `best_two` (how many of its best scores make up a group's value), or `other`.
        scaled: Whether weights are multiplied by a factor.
        shared: `none`, `plain`, `gated`, or `plain_other_width`.
        head_bias: Whether the output head has a bias.
        scale: `head` if scores are divided by the root of the head size, else `other`.
    """

    config: "Config"
    attention: str
    latent_norm_eps: bool
    scaled_by_yarn: bool
    layers: str
    norm: str
    positions: str
    rope: str
    yarn_rounds: bool
    rope_layout: str
    sinks: str
    window: str
    clipped: bool
    qk_norm: str
    attention_bias: str
    grouped: bool
    free_head_size: bool
    activation: str
    mlp_bias: bool
    router: str
    score: str
    gate_on_input: bool
    router_bias: bool
    norm_topk: bool
    balancing_bias: bool
    groups: str
    scaled: bool
    shared: str
    head_bias: bool
    scale: str

    @property
    def moe(self) -> bool:
        """True if the model has MoE layers."""
        return self.layers != "dense"

    @property
    def latent_sizes(self) -> dict[str, int]:
        """Sizes of latent attention by DeepSeek's names; empty without it."""
        return self.config.latent_attention or {}

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together."""
        config = self.config
        return config.shared_expert_intermediate_size or config.n_shared_expert * config.moe_intermediate_size

    @property
    def rope_tables(self) -> tuple[list[float], float]:
        """Angle per position of each pair of rotated elements, and the attention factor."""
        config = self.config
        if not config.rope_n_elem:
            return [], 1.0
        adjustments = config.rope_adjustments
        frequency_F, factor = rope_frequencies(config.rope_n_elem, config.rope_base, adjustments)
        return frequency_F.tolist(), factor


def facts_of(config: "Config", state: "dict[str, Tensor]") -> Facts:
    """Return the facts of a model.

    Args:
        config: Its configuration.
        state: Its weights, which alone tell whether a balancing bias differs between experts.

    Raises:
        SettingsError: If the model has a setting that no format can express; the message names it.
    """
    _require_exportable(config)
    moe, latent = config.mlp_class_name in MOE_CLASS_NAMES, config.latent_attention is not None
    return Facts(
        config=config,
        attention="latent" if latent else "grouped",
        latent_norm_eps=not latent or config.norm_eps == DEEPSEEK_EPS,
        scaled_by_yarn=latent and bool(present_adjustments(config.rope_adjustments).get("mscale_all_dim")),
        layers=_layers(config) if moe else "dense",
        norm="rms" if config.norm_class_name == "RMSNorm" else "layer",
        positions=_positions(config),
        rope={"plain": "default"}.get(kind := rope_kind(config.rope_adjustments), kind),
        yarn_rounds=present_adjustments(config.rope_adjustments).get("truncate", True),
        rope_layout="interleaved" if config.rope_interleave else "half",
        sinks=_how_many([layer_has_sinks(config, i) for i in range(config.n_layer)]),
        window=_window(config),
        clipped=config.clip_qkv is not None,
        qk_norm={"default": "head", "olmo2": "whole"}[config.norm_qk_type] if config.norm_qk else "none",
        attention_bias="all" if config.bias else "qkv" if config.attn_bias else "none",
        grouped=config.n_query_groups != config.n_head,
        free_head_size=not latent and config.head_size * config.n_head != config.n_embd,
        activation=_activation(config),
        mlp_bias=config.bias,
        router=config.router_type if moe else "none",
        score=(config.router_score_function or "none") if moe else "none",
        gate_on_input=bool(moe and config.expert_gate_on_input),
        router_bias=bool(moe and config.router_bias),
        norm_topk=bool(moe and config.norm_topk_prob),
        balancing_bias=moe and any(_distinguishes(t) for n, t in state.items() if n.endswith("correction_bias")),
        groups=_groups(config) if moe else "none",
        scaled=moe and config.routed_scaling_factor != 1.0,
        shared=_shared(config) if moe else "none",
        head_bias=config.lm_head_bias,
        scale="head" if config.attention_scores_scalar in (None, _score_size(config)) else "other",
    )


def _require_exportable(config: "Config") -> None:
    for name, unused in _UNSUPPORTED.items():
        value = getattr(config, name)
        if value != unused:
            needed = json.dumps(unused)
            raise SettingsError(f"model_config.{name}: {value!r} must be {needed} for an export; train without it")
    if config.mlp_class_name not in (*MOE_CLASS_NAMES, *_DENSE):
        raise SettingsError(
            f"model_config.mlp_class_name: {config.mlp_class_name} must be one of "
            f"{', '.join((*MOE_CLASS_NAMES, *_DENSE))} for an export"
        )
    if family := family_of_norms(config.norm_class_name, config.name):
        raise SettingsError(
            f"model_config.name: {config.name!r} must be without {family!r} for an export: LitGPT makes norms of that "
            "family because of it; train under another name"
        )
    if config.rope_n_elem % 2:
        raise SettingsError(f"model_config.rotary_percentage: {config.rope_n_elem} rotated elements must be even")
    if rope_kind(config.rope_adjustments) == "dynamic":
        raise SettingsError(
            "model_config.rope_adjustments.dynamic: true must be left out for an export: classes disagree on which "
            "length chooses the base"
        )
    if config.mlp_class_name in MOE_CLASS_NAMES and config.router_type not in _ROUTERS:
        raise SettingsError(
            f"model_config.router_type: {config.router_type} must be one of {', '.join(_ROUTERS)} for an export"
        )
    if config.mlp_class_name in MLP_CLASS_NAMES and config.mlp_activation not in _ACTIVATIONS:
        raise SettingsError(
            f"model_config.mlp_activation: {config.mlp_activation} must be one of {', '.join(_ACTIVATIONS)} for an "
            "export"
        )


def left_out(config: "Config") -> list[str]:
    """Return a sentence about each setting that an export of the model leaves out."""
    return [
        f"{name}: {value} is left out: {instead}"
        for name, instead in _LEFT_OUT.items()
        if (value := getattr(config, name)) is not None
    ]


def leading_dense_layers(config: "Config") -> int:
    """Return how many layers before the first MoE layer are dense."""
    return next((i for i in range(config.n_layer) if not is_dense_layer(config, i)), config.n_layer)


def window_of(config: "Config", layer: int) -> int | None:
    """Return how many keys a query of a layer sees, its own included, or None for all."""
    if config.sliding_window_size is None:
        return None
    indices = config.sliding_window_indices
    return config.sliding_window_size if indices is None or indices[layer] else None


def layer_has_sinks(config: "Config", layer: int) -> bool:
    """Return whether the attention of a layer has sinks."""
    return config.attention_class_name is not None and has_sinks(config, layer)


def _score_size(config: "Config") -> int:
    return config.head_size if config.latent_attention is None else config.qk_head_dim


def _layers(config: "Config") -> str:
    dense = [is_dense_layer(config, i) for i in range(config.n_layer)]
    first = leading_dense_layers(config)
    return "moe" if not any(dense) else "mixed" if not any(dense[first:]) else "alternating"


def _positions(config: "Config") -> str:
    if config.position_embedding == "learned":
        return "learned"
    if config.latent_attention is not None:
        return "rotary"
    return "rotary" if config.rope_n_elem == config.head_size else "partial_rotary"


def _window(config: "Config") -> str:
    return _how_many([window_of(config, i) is not None for i in range(config.n_layer)])


def _how_many(layers: list[bool]) -> str:
    return "all" if all(layers) else "some" if any(layers) else "none"


def _activation(config: "Config") -> str:
    name = {"LLaMAMLP": "swiglu", "GptNeoxMLP": "gelu"}.get(config.mlp_class_name) or config.mlp_activation
    return "gelu_tanh" if name == "gelu" and config.gelu_approximate == "tanh" else name


def _distinguishes(bias_E: "Tensor") -> bool:
    return bool((bias_E != bias_E[0]).any())


def _groups(config: "Config") -> str:
    if not config.n_expert_groups:
        return "none"
    return {1: "best_one", 2: "best_two"}.get(config.n_topk_scores_per_group, "other")


def _shared(config: "Config") -> str:
    if not config.n_shared_expert:
        return "none"
    if config.shared_expert_gate:
        return "gated"
    width = config.shared_expert_intermediate_size
    return "plain" if width in (None, config.n_shared_expert * config.moe_intermediate_size) else "plain_other_width"
