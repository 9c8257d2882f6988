"""Checking a model configuration: every field by its table entry, then rules that concern several fields.

A rule yields messages: the field as the user writes it, its value, and the remedy. Imports neither torch nor LitGPT.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

from litgpt_moe_ext.config.features import LITGPT_ACTIVATIONS, MOE_CLASS_NAMES, missing_feature, router_type_of
from litgpt_moe_ext.config.fields import FIELDS, REQUIRED, Field, uses_plugin
from litgpt_moe_ext.config.rope import rope_kind, validate_rope_adjustments
from litgpt_moe_ext.config.types import check_field
from litgpt_moe_ext.errors import SettingsError, refuse_first
from litgpt_moe_ext.field_types import PositiveInt, RotaryBase

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

    Rule = Callable[[Config], Iterator[str]]


def resolve(config: "Config") -> None:
    """Fill in defaults and check everything that does not depend on LitGPT's derived fields, in place.

    Args:
        config: A configuration whose derived fields need not be set yet.

    Raises:
        SettingsError: If a setting is out of range, contradicts another, or would be ignored.
    """
    if config.mlp_class_name in MOE_CLASS_NAMES:
        if config.router_type is None:
            config.router_type = MOE_CLASS_NAMES[config.mlp_class_name]
        FIELDS["router_type"].check(config, "router_type")
    for name, field in FIELDS.items():
        _resolve_field(config, name, field)
    if config.mlp_class_name in MOE_CLASS_NAMES and config.moe_intermediate_size is None:
        config.moe_intermediate_size = config.intermediate_size
    if uses_plugin(config):
        validate_rope_adjustments(config.rope_adjustments)
        if config.latent_attention is not None:  # LitGPT checks its other settings
            check_field("rope_base", config.rope_base, RotaryBase)
    _apply(_RULES, config)


def check_derived(config: "Config") -> None:
    """Check the rules of the attention layer that need LitGPT's derived fields.

    Args:
        config: A configuration that went through `resolve`, with derived fields.

    Raises:
        SettingsError: If `SinkAttention` cannot do what the configuration requires.
    """
    _apply(_DERIVED_RULES, config)


def _apply(rules: "Iterable[tuple[tuple[str, ...], Rule]]", config: "Config") -> None:
    for owner, rule in rules:
        if missing_feature(config, owner) is None:
            refuse_first(rule(config))


def _resolve_field(config: "Config", name: str, field: Field) -> None:
    value = getattr(config, name)
    missing = missing_feature(config, field.owner)
    if missing is not None:
        feature, reason = missing
        is_foreign = field.of_litgpt and feature == field.owner[0]
        if value != field.unset and not is_foreign:
            raise SettingsError(
                f"{name}: {value!r} would be ignored because {reason}; remove it from the model configuration, or set "
                f"it to {json.dumps(field.unset)}"
            )
        return
    default = _default(config, name, field)
    if value == field.unset and default is not REQUIRED:
        if default is not None:
            setattr(config, name, default)
        return
    remedy = f" ({field.doc})" if default is REQUIRED or default is None else f"; leave it out for {default!r}"
    field.check(config, name, remedy)


def _default(config: "Config", name: str, field: Field) -> Any:
    if config.mlp_class_name in MOE_CLASS_NAMES and "moe" in field.owner:
        return router_type_of(config).defaults.get(name, field.default)
    return field.default


def _router(config: "Config") -> Iterator[str]:
    own = MOE_CLASS_NAMES["NoisyTopKMoE"]
    if config.mlp_class_name == "NoisyTopKMoE" and config.router_type != own:
        yield (
            f"router_type: {config.router_type!r} contradicts mlp_class_name: NoisyTopKMoE, whose router is {own}; "
            "write mlp_class_name: MoE, or remove router_type"
        )


def _expert_width(config: "Config") -> Iterator[str]:
    if config.moe_intermediate_size is None:
        yield (
            f"moe_intermediate_size: null must be set for {config.mlp_class_name}: it is the hidden width of one "
            "expert (intermediate_size is used for it if moe_intermediate_size is left out)"
        )


def _dense_layers(config: "Config") -> Iterator[str]:
    layers, n_layer = config.mlp_only_layers, config.n_layer
    if layers is None:
        return
    if n_layer == 1:
        yield f"mlp_only_layers: {layers!r} leaves no MoE layer, since n_layer is 1; remove it"
    some_of_them = 0 < len(set(layers)) == len(layers) < n_layer
    if not (some_of_them and all(type(index) is int and 0 <= index < n_layer for index in layers)):
        yield (
            f"mlp_only_layers: {layers!r} must be a list of different integers from 0 to {n_layer - 1} (n_layer - 1), "
            "not all of them"
        )


def _dense_width(config: "Config") -> Iterator[str]:
    reasons = {
        "mlp_class_name": config.mlp_class_name == "FeedForward",
        "first_k_dense_replace": config.first_k_dense_replace,
        "decoder_sparse_step": (config.decoder_sparse_step or 1) > 1,
        "mlp_only_layers": config.mlp_only_layers,
    }
    for name in (name for name, has_dense in reasons.items() if has_dense and config.intermediate_size is None):
        yield (
            f"intermediate_size: null must be set because {name} is {getattr(config, name)}: it is the hidden width of "
            "the dense layers"
        )


def _groups(config: "Config") -> Iterator[str]:
    n_group, n_expert = config.n_expert_groups, config.n_expert
    if n_expert % n_group:
        divisors = [g for g in range(2, n_expert + 1) if n_expert % g == 0]
        remedy = f"choose one of {divisors}" if divisors else "remove it, or raise n_expert"
        yield f"n_expert_groups: {n_group} must divide n_expert: {n_expert}; {remedy}"
    group_size = n_expert // n_group
    if config.n_topk_scores_per_group > group_size:
        yield (
            f"n_topk_scores_per_group: {config.n_topk_scores_per_group} must be an integer from 1 to {group_size}, the "
            "number of experts in a group"
        )
    reachable = config.n_topk_groups * group_size
    if config.n_expert_per_token > reachable:
        yield (
            f"n_expert_per_token: {config.n_expert_per_token} is more than the {config.n_topk_groups} chosen groups of "
            f"{group_size} experts hold; use at most {reachable}, or raise n_topk_groups"
        )


def _bias_schedule(config: "Config") -> Iterator[str]:
    schedule = config.router_bias_update_schedule or {}
    if "decay_steps" in schedule and "decay_start" not in schedule:
        yield (
            f"router_bias_update_schedule.decay_steps: {schedule['decay_steps']} needs decay_start, the step from "
            "which the rate falls; add it"
        )


def _residual_dropout(config: "Config") -> Iterator[str]:
    for name in ("post_attention_norm", "post_mlp_norm"):
        if config.residual_dropout is not None and getattr(config, name):
            yield (
                f"residual_dropout: {config.residual_dropout!r} cannot be combined with {name}: true; remove one of "
                "them"
            )


def _sinks(config: "Config") -> Iterator[str]:
    sinks, n_layer = config.attention_sinks, config.n_layer
    if isinstance(sinks, list) and len(sinks) != n_layer:
        yield f"attention_sinks: {sinks!r} must be true or false, or a list of {n_layer} (n_layer) such entries"


def _streaming_cache(config: "Config") -> Iterator[str]:
    first, window = config.streaming_cache_first, config.streaming_cache_window
    if (first is None) != (window is None):
        yield (
            f"streaming_cache_first: {json.dumps(first)} and streaming_cache_window: {json.dumps(window)} must both be "
            "set (usual are 4 and the rest of block_size)"
        )
    if first is None or window is None:
        return
    if first >= config.block_size:
        yield (
            f"streaming_cache_first: {first} leaves no room for streaming_cache_window in the model's context "
            f"(block_size: {config.block_size}); use less"
        )
    if first + window > config.block_size:
        yield (
            f"streaming_cache_window: {window} and streaming_cache_first: {first} are {first + window} tokens "
            f"together, more than the model's context (block_size: {config.block_size}); use at most "
            f"{config.block_size - first}"
        )
    for name in ("position_embedding", "attention_document_boundary", "rope_local_base_freq"):
        if getattr(config, name) is not None:
            yield f"streaming_cache_window: {window} does not go with {name}: {getattr(config, name)!r}; remove either"


class _LatentSizes(TypedDict):
    q_lora_rank: PositiveInt
    kv_lora_rank: PositiveInt
    qk_rope_head_dim: PositiveInt
    qk_nope_head_dim: PositiveInt
    v_head_dim: PositiveInt


def _latent_attention(config: "Config") -> Iterator[str]:
    # LitGPT's latent attention ignores unknown settings silently.
    sizes = config.latent_attention
    if sizes is None or config.attention_class_name is not None or not uses_plugin(config):
        return
    check_field("latent_attention", sizes, _LatentSizes)
    if sizes["qk_rope_head_dim"] % 2:
        yield f"latent_attention.qk_rope_head_dim: {sizes['qk_rope_head_dim']} must be even"
    for name in ("sliding_window_size", "norm_qk", "rope_local_base_freq"):
        if getattr(config, name):
            yield (
                f"{name}: {getattr(config, name)!r} would be ignored because latent_attention is set; remove it from "
                "the model configuration"
            )


def _litgpts_rotation(config: "Config") -> Iterator[str]:
    # LitGPT's YaRN stretches the wrong end of the spectrum.
    if config.attention_class_name is not None or config.latent_attention is not None or not uses_plugin(config):
        return
    kind = rope_kind(config.rope_adjustments)
    if kind in ("dynamic", "yarn"):
        yield (
            f"rope_adjustments: {config.rope_adjustments!r} ({kind}) is not what LitGPT's attention computes; set "
            "attention_class_name: SinkAttention (with attention_sinks: false for ordinary attention)"
        )


def _litgpts_pairs(config: "Config") -> Iterator[str]:
    # Without the second of a pair, LitGPT ignores the first or fails in the first forward pass.
    if not uses_plugin(config):
        return
    for name, other in (("rope_indices", "rope_local_base_freq"), ("sliding_window_indices", "sliding_window_size")):
        if getattr(config, name) is not None and getattr(config, other) is None:
            yield f"{name}: {getattr(config, name)!r} needs {other}; add it, or remove {name}"
    if config.shared_attention_norm and not config.parallel_residual:
        yield "shared_attention_norm: True needs parallel_residual: true; set it, or shared_attention_norm: false"


def _litgpts_dense_classes(config: "Config") -> Iterator[str]:
    # Which LitGPT refuses too, without naming this field.
    if config.first_k_dense_replace is not None and config.mlp_class_name in LITGPT_ACTIVATIONS:
        yield (
            f"first_k_dense_replace: {config.first_k_dense_replace!r} would be ignored because mlp_class_name: "
            f"{config.mlp_class_name} is a dense layer; remove it from the model configuration"
        )


def _learned_positions(config: "Config") -> Iterator[str]:
    if config.position_embedding is None:
        return
    if config.rotary_percentage:
        yield (
            f"rotary_percentage: {config.rotary_percentage!r} must be 0 with position_embedding: learned; positions "
            "would be counted twice"
        )
    if config.scale_embeddings:
        yield (
            "scale_embeddings: True does not go with position_embedding: learned, whose embeddings would be scaled "
            "too; set it to false"
        )


def _documents(config: "Config") -> Iterator[str]:
    token_id, size = config.attention_document_token_id, config.padded_vocab_size
    if token_id is not None and token_id >= size:
        yield (
            f"attention_document_token_id: {token_id!r} must be the id of the tokenizer's "
            f"{config.attention_document_boundary} token, an integer from 0 to {size - 1} (padded_vocab_size: {size})"
        )


def _clipping(config: "Config") -> Iterator[str]:
    if config.clip_qkv is not None and config.norm_qk and config.norm_qk_type == "default":
        yield (
            f"clip_qkv: {config.clip_qkv!r} does not go with norms of single heads; set norm_qk_type: olmo2, or "
            "norm_qk: false"
        )


def _rotary_elements(config: "Config") -> Iterator[str]:
    n_elem = config.rope_n_elem
    gives = (
        f"but rotary_percentage: {config.rotary_percentage!r} of head_size: {config.head_size!r} gives {n_elem}; "
        "change either"
    )
    if config.rope_interleave and n_elem % 2:
        yield f"rope_interleave: True needs an even number of rotated elements, {gives}"
    if rope_kind(config.rope_adjustments) == "dynamic" and 0 < n_elem <= 2:
        yield f"rope_adjustments.dynamic: True needs more than two rotated elements, {gives}"


# The features that a model must have for a rule to apply, as for fields, and the rule.
_RULES: "tuple[tuple[tuple[str, ...], Rule], ...]" = (
    (("moe",), _router),
    (("moe",), _expert_width),
    (("moe",), _dense_layers),
    (("feed_forward",), _dense_width),
    (("moe", "groups", "expert_groups"), _groups),
    (("moe", "bias"), _bias_schedule),
    ((), _residual_dropout),
    (("attention",), _sinks),
    (("attention",), _streaming_cache),
    ((), _latent_attention),
    ((), _litgpts_rotation),
    ((), _litgpts_pairs),
    ((), _litgpts_dense_classes),
)
_DERIVED_RULES: "tuple[tuple[tuple[str, ...], Rule], ...]" = (
    (("attention",), _learned_positions),
    (("attention",), _documents),
    (("attention",), _rotary_elements),
    (("attention",), _clipping),
)
