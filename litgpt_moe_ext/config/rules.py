"""Checking a model configuration: every field by its table entry, then rules that concern several fields.

Errors name the field as the user writes it, its value, and the remedy. Imports neither torch nor LitGPT.
"""

from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.config.features import (
    MLP_CLASS_NAMES,
    MOE_CLASS_NAMES,
    missing_feature,
    router_type_of,
)
from litgpt_moe_ext.config.fields import FIELDS, REQUIRED, Field, uses_plugin
from litgpt_moe_ext.config.rope import rope_kind, validate_rope_adjustments
from litgpt_moe_ext.config.types import integer
from litgpt_moe_ext.errors import SettingsError

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


def resolve(config: "Config") -> None:
    """Fill in defaults and check everything that does not depend on LitGPT's derived fields, in place.

    Args:
        config: A configuration whose fields are set, but whose derived fields need not be.

    Raises:
        SettingsError: If a setting is out of range, contradicts another, or would be ignored.
    """
    _choose_router(config)
    for name, field in FIELDS.items():
        _resolve_field(config, name, field)
    for rule in (_expert_width, _dense_width, _groups, _bias_schedule, _residual_dropout, _streaming_cache):
        rule(config)
    if uses_plugin(config) and config.attention_class_name is None:
        _latent_attention(config)
        _litgpts_rotation(config)


def check_derived(config: "Config") -> None:
    """Check the rules of the attention layer that need LitGPT's derived fields.

    Args:
        config: A configuration that went through `resolve`, with derived fields.

    Raises:
        SettingsError: If `SinkAttention` cannot do what the configuration asks of it.
    """
    if config.attention_class_name is not None:
        for rule in (_learned_positions, _documents, _rotary_elements, _clipping):
            rule(config)


def _choose_router(config: "Config") -> None:
    default = MOE_CLASS_NAMES.get(config.mlp_class_name)
    if default is None:
        return
    if config.router_type is None:
        config.router_type = default
    FIELDS["router_type"].type.check("router_type", config.router_type, config)
    if config.mlp_class_name == "NoisyTopKMoE" and config.router_type != default:
        raise SettingsError(
            f"router_type: {config.router_type!r} contradicts mlp_class_name: NoisyTopKMoE, whose router is {default}; "
            "write mlp_class_name: MoE, or remove router_type"
        )


def _resolve_field(config: "Config", name: str, field: Field) -> None:
    value = getattr(config, name)
    missing = missing_feature(config, field.owner)
    if missing is not None:
        feature, reason = missing
        is_foreign = field.of_litgpt and feature == field.owner[0]
        if value != field.unset and not is_foreign:
            raise SettingsError(
                f"{name}: {value!r} would be ignored because {reason}; remove it from the model configuration"
            )
        return
    default = _default(config, name, field)
    if value == field.unset and default is not REQUIRED:
        if default is not None:
            setattr(config, name, default)
        return
    remedy = f" ({field.doc})" if default is REQUIRED or default is None else f"; leave it out for {default!r}"
    field.type.check(name, value, config, remedy)


def _default(config: "Config", name: str, field: Field) -> Any:
    if config.mlp_class_name in MOE_CLASS_NAMES and "moe" in field.owner:
        return router_type_of(config).defaults.get(name, field.default)
    return field.default


def _expert_width(config: "Config") -> None:
    if config.mlp_class_name not in MOE_CLASS_NAMES or config.moe_intermediate_size is not None:
        return
    if config.intermediate_size is None:
        raise SettingsError(
            f"moe_intermediate_size: None must be set for {config.mlp_class_name}: it is the hidden width of one "
            "expert (intermediate_size is used for it if moe_intermediate_size is left out)"
        )
    config.moe_intermediate_size = config.intermediate_size


def _dense_width(config: "Config") -> None:
    if config.mlp_class_name not in MLP_CLASS_NAMES or config.intermediate_size is not None:
        return
    if config.mlp_class_name == "FeedForward":
        reason = "mlp_class_name is FeedForward"
    elif config.first_k_dense_replace:
        reason = f"first_k_dense_replace is {config.first_k_dense_replace}"
    elif (config.decoder_sparse_step or 1) > 1:
        reason = f"decoder_sparse_step is {config.decoder_sparse_step}"
    elif config.mlp_only_layers:
        reason = f"mlp_only_layers is {config.mlp_only_layers}"
    else:
        return
    raise SettingsError(
        f"intermediate_size: None must be set because {reason}: it is the hidden width of the dense layers"
    )


def _groups(config: "Config") -> None:
    n_group, n_expert = config.n_expert_groups, config.n_expert
    if config.mlp_class_name not in MOE_CLASS_NAMES or n_group is None:
        return
    if n_expert % n_group:
        divisors = [g for g in range(2, n_expert + 1) if n_expert % g == 0]
        raise SettingsError(f"n_expert_groups: {n_group} must divide n_expert: {n_expert}; choose one of {divisors}")
    group_size = n_expert // n_group
    if config.n_topk_scores_per_group > group_size:
        raise SettingsError(
            f"n_topk_scores_per_group: {config.n_topk_scores_per_group} must be an integer from 1 to {group_size}, the "
            "number of experts in a group"
        )
    reachable = config.n_topk_groups * group_size
    if config.n_expert_per_token > reachable:
        raise SettingsError(
            f"n_expert_per_token: {config.n_expert_per_token} is more than the {config.n_topk_groups} chosen groups of "
            f"{group_size} experts hold; use at most {reachable}, or raise n_topk_groups"
        )


def _bias_schedule(config: "Config") -> None:
    schedule = config.router_bias_update_schedule or {}
    if "decay_steps" in schedule and "decay_start" not in schedule:
        raise SettingsError(
            f"router_bias_update_schedule.decay_steps: {schedule['decay_steps']} needs decay_start, the step from "
            "which the rate falls; add it"
        )


def _residual_dropout(config: "Config") -> None:
    for name in ("post_attention_norm", "post_mlp_norm"):
        if config.residual_dropout is not None and getattr(config, name):
            raise SettingsError(
                f"residual_dropout: {config.residual_dropout!r} cannot be combined with {name}: true; remove one of "
                "them"
            )


def _streaming_cache(config: "Config") -> None:
    first, window = config.streaming_cache_first, config.streaming_cache_window
    if first is None and window is None:
        return
    if first is None or window is None:
        raise SettingsError(
            f"streaming_cache_first: {first!r} and streaming_cache_window: {window!r} must both be set (usual are 4 "
            "and the rest of block_size)"
        )
    if first + window > config.block_size:
        raise SettingsError(
            f"streaming_cache_window: {window} and streaming_cache_first: {first} are {first + window} tokens "
            f"together, more than the model's context (block_size: {config.block_size}); use at most "
            f"{config.block_size - first}"
        )
    for name in ("position_embedding", "attention_document_boundary", "rope_local_base_freq"):
        if getattr(config, name) is not None:
            raise SettingsError(
                f"streaming_cache_window: {window} does not go with {name}: {getattr(config, name)!r}; remove either"
            )


def _latent_attention(config: "Config") -> None:
    # LitGPT's latent attention: it takes what it knows and says nothing about the rest.
    sizes = config.latent_attention
    if sizes is None:
        return
    if not isinstance(sizes, dict) or set(sizes) != set(_LATENT_SIZES):
        raise SettingsError(
            f"latent_attention: {sizes!r} must be a dictionary with the keys {', '.join(_LATENT_SIZES)}"
        )
    for name, size in sizes.items():
        integer(1).check(f"latent_attention.{name}", size)
    if sizes["qk_rope_head_dim"] % 2:
        raise SettingsError(f"latent_attention.qk_rope_head_dim: {sizes['qk_rope_head_dim']} must be even")
    for name in ("sliding_window_size", "norm_qk", "rope_local_base_freq"):
        if getattr(config, name):
            raise SettingsError(
                f"{name}: {getattr(config, name)!r} would be ignored because latent_attention is set; remove it from "
                "the model configuration"
            )


_LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


def _litgpts_rotation(config: "Config") -> None:
    # LitGPT skips keys it does not know, and its YaRN stretches the wrong end of the spectrum.
    validate_rope_adjustments(config.rope_adjustments)
    kind = rope_kind(config.rope_adjustments)
    if kind in ("dynamic", "yarn") and config.latent_attention is None:
        raise SettingsError(
            f"rope_adjustments: {config.rope_adjustments!r} ({kind}) is not what LitGPT's attention computes; set "
            "attention_class_name: SinkAttention (with attention_sinks: false for ordinary attention)"
        )


def _learned_positions(config: "Config") -> None:
    if config.position_embedding is None:
        return
    if config.rotary_percentage:
        raise SettingsError(
            f"rotary_percentage: {config.rotary_percentage!r} must be 0 with position_embedding: learned; positions "
            "would be counted twice"
        )
    if config.scale_embeddings:
        raise SettingsError(
            "scale_embeddings: True does not go with position_embedding: learned, whose embeddings would be scaled "
            "too; set it to false"
        )


def _documents(config: "Config") -> None:
    token_id, size = config.attention_document_token_id, config.padded_vocab_size
    if token_id is not None and token_id >= size:
        raise SettingsError(
            f"attention_document_token_id: {token_id!r} must be the id of the tokenizer's "
            f"{config.attention_document_boundary} token, an integer from 0 to {size - 1} (padded_vocab_size: {size})"
        )


def _clipping(config: "Config") -> None:
    if config.clip_qkv is not None and config.norm_qk and config.norm_qk_type == "default":
        raise SettingsError(
            f"clip_qkv: {config.clip_qkv!r} does not go with norms of single heads; set norm_qk_type: olmo2, or "
            "norm_qk: false"
        )


def _rotary_elements(config: "Config") -> None:
    n_elem = config.rope_n_elem
    if config.rope_interleave and n_elem % 2:
        needed = "rope_interleave: True needs an even number of rotated elements"
    elif rope_kind(config.rope_adjustments) == "dynamic" and 0 < n_elem <= 2:
        needed = "rope_adjustments.dynamic: True needs more than two rotated elements"
    else:
        return
    raise SettingsError(
        f"{needed}, but rotary_percentage: {config.rotary_percentage!r} of head_size: {config.head_size!r} gives "
        f"{n_elem}; change either"
    )
