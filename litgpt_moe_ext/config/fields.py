"""The table of fields that this package adds to `litgpt.Config`, or uses of it.

It is the single source for validation, defaults, the refusal of settings that would be ignored, and the tables of the
documentation. Rules that concern several fields are in
`litgpt_moe_ext.config.rules`. Imports neither torch nor LitGPT.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from litgpt_moe_ext.attention.kernels.registry import KERNELS
from litgpt_moe_ext.config import features, rope
from litgpt_moe_ext.config.types import check_field
from litgpt_moe_ext.field_types import (
    AtLeastTwo,
    ExpertCount,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    RotaryBase,
    Share,
    UpTo,
)
from litgpt_moe_ext.moe.registry import ACTIVATIONS, EXPERT_BACKENDS, LOSSES, ROUTERS, Loss, loss_field

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# The default of a field that must be set.
REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A field of a model configuration.

    Attributes:
        type: Its type, as in `litgpt_moe_ext.field_types`.
        doc: Its meaning, one line.
        owner: Features (`litgpt_moe_ext.config.features`) that a model needs to read the field; without them it would
            be ignored, and is refused. A field of LitGPT is left alone if the first feature is missing.
        default: Its value if left out, filled in for models with the features of `owner`; `REQUIRED` if it must be set.
        of_litgpt: Whether LitGPT has the field.
        unset: Its value before defaults are filled in: None for the fields of this package.
        of_training: Whether it concerns how a model is trained or computed, not what the model is: a run may continue
            from a checkpoint with another value.
    """

    type: Any
    doc: str
    owner: tuple[str, ...] = ()
    default: Any = None
    of_litgpt: bool = False
    unset: Any = None
    of_training: bool = False

    def check(self, config: "Config", name: str, remedy: str = "") -> None:
        """Raise SettingsError, with a remedy, unless a configuration has a value of this type under a name."""
        kind = self.type.beside(config) if isinstance(self.type, UpTo) else self.type
        check_field(name, getattr(config, name), kind, remedy)


class BiasSchedule(TypedDict, total=False):
    """How the rate of the balancing bias changes, in optimizer steps."""

    warmup_steps: NonNegativeInt
    decay_start: NonNegativeInt
    decay_steps: NonNegativeInt


def _litgpt(type: Any, doc: str, owner: tuple[str, ...], default: Any = None, unset: Any = None) -> Field:
    return Field(type, doc, owner, default, True, unset)


def loss_weight(loss: Loss) -> Field:
    """Return the field that holds the weight of an auxiliary loss."""
    doc = f"weight of {loss.doc} (0 by default)"
    return Field(NonNegativeFloat, doc, ("feed_forward", "moe", *loss.needs), of_training=True)


_FEED_FORWARD, _MOE = ("feed_forward",), ("feed_forward", "moe")
_SHARED, _GROUPS = (*_MOE, "shared_experts"), (*_MOE, "groups", "expert_groups")
_ATTENTION = ("attention",)

FEED_FORWARD_FIELDS = {
    # LitGPT looks the class up; `litgpt_moe_ext.host.config` refuses unknown ones.
    "mlp_class_name": _litgpt(
        Annotated[str, f"{', '.join(features.MLP_CLASS_NAMES)}, or one of LitGPT's"],
        "feed-forward layer; `SharedExpertMoE` and `NoisyTopKMoE` are `MoE` with another default of `router_type`, "
        "`FeedForward` is dense",
        (),
    ),
    "intermediate_size": _litgpt(PositiveInt, "hidden width of dense layers", _FEED_FORWARD),
    "mlp_activation": Field(
        OneOf(ACTIVATIONS),
        "activation of experts, shared experts and dense layers; `clamped_swiglu` is that of GPT-OSS",
        _FEED_FORWARD,
        "swiglu",
    ),
    "gelu_approximate": _litgpt(
        OneOf(("none", "tanh")), "how GELU is computed", (*_FEED_FORWARD, "gelu"), unset="none"
    ),
    "n_expert": _litgpt(ExpertCount, "number of routed experts", _MOE, REQUIRED, unset=0),
    "n_expert_per_token": _litgpt(
        UpTo(1, "n_expert"), "number of experts that a token visits (top-k)", _MOE, REQUIRED, unset=0
    ),
    "moe_intermediate_size": _litgpt(PositiveInt, "hidden width of one expert (`intermediate_size` by default)", _MOE),
    "expert_dropout": Field(
        Share,
        "probability of dropping a hidden activation of an expert in training (0 by default)",
        _MOE,
        of_training=True,
    ),
    "expert_gate_on_input": Field(
        bool, "whether the gate value multiplies an expert's input, as in Llama 4 (false: its output)", _MOE
    ),
    "expert_backend": Field(
        OneOf(EXPERT_BACKENDS),
        "the only implementation of the experts allowed (the fastest that works by default); `loop` also keeps the "
        "router to torch's operators",
        _MOE,
        of_training=True,
    ),
    "n_shared_expert": _litgpt(NonNegativeInt, "number of experts that every token visits (0 by default)", _MOE),
    "shared_expert_intermediate_size": Field(
        PositiveInt,
        "width of all shared experts together (by default `n_shared_expert` times one expert's)",
        _SHARED,
    ),
    "shared_expert_gate": Field(
        bool, "whether a sigmoid gate weighs the shared experts, as in Qwen2-MoE (false by default)", _SHARED
    ),
    "first_k_dense_replace": _litgpt(UpTo(0, "n_layer"), "how many first layers are dense (0 by default)", _MOE),
    "decoder_sparse_step": Field(
        UpTo(1, "n_layer"),
        "one in this many layers after the first dense ones is an MoE layer, the last of them (1 by default)",
        _MOE,
    ),
    "mlp_only_layers": Field(
        Annotated[list[int], "a list of different integers from 0 to n_layer - 1, not all of them"],
        "indices of more layers that are dense, as in Qwen's models (none by default)",
        _MOE,
    ),
    "residual_dropout": Field(
        Share,
        "probability of dropping an element of what a layer adds to the residual stream (0 by default)",
        of_training=True,
    ),
}

ROUTING_FIELDS = {
    "router_type": Field(
        OneOf(ROUTERS), "how experts are chosen (`noisy_topk` in `NoisyTopKMoE`, else `topk` by default)", _MOE
    ),
    "router_score_function": Field(
        OneOf(("sigmoid", "softmax")), "how logits become scores", (*_MOE, "score_function"), "sigmoid"
    ),
    "norm_topk_prob": _litgpt(
        bool,
        "whether the scores of the chosen experts are divided by their sum; with softmax, true is the order of Mixtral "
        "and GPT-OSS (top-k, then softmax), false the order of Switch and DeepSeek-V2",
        (*_MOE, "norm_topk_prob"),
        unset=False,
    ),
    "routed_scaling_factor": _litgpt(PositiveFloat, "factor of the gate values", _MOE, unset=1.0),
    "n_expert_groups": _litgpt(
        AtLeastTwo, "number of groups of experts, for group-limited routing (DeepSeek-V3)", (*_MOE, "groups")
    ),
    "n_topk_groups": _litgpt(
        UpTo(1, "n_expert_groups"), "number of groups that a token may choose from", _GROUPS, REQUIRED
    ),
    "n_topk_scores_per_group": _litgpt(
        PositiveInt, "number of best scores whose sum is the score of a group", _GROUPS, REQUIRED
    ),
    "router_bias": Field(
        bool, "whether the gate has a learned bias, as in GPT-OSS (false by default)", (*_MOE, "logits")
    ),
    "router_jitter_noise": Field(
        Share,
        "largest relative noise on the router's input in training (0 by default)",
        (*_MOE, "logits"),
        of_training=True,
    ),
    "router_bias_update_rate": Field(
        NonNegativeFloat,
        "how far the balancing bias moves after every optimizer step; 0 switches it off",
        (*_MOE, "bias"),
        0.001,
        of_training=True,
    ),
    "router_bias_update_schedule": Field(
        BiasSchedule,
        "how that rate changes, in optimizer steps: rises over `warmup_steps`, falls to 0 over `decay_steps` from "
        "`decay_start`",
        (*_MOE, "bias", "moving_bias"),
        of_training=True,
    ),
    **{loss_field(name): loss_weight(loss) for name, loss in LOSSES.items()},
    "router_load_balancing_loss_scope": Field(
        OneOf(("micro_batch", "global_batch")),
        "the tokens over which the load-balancing loss takes each expert's share: the micro-batch, or the step so far "
        "on all processes",
        (*_MOE, "logits", "load_balancing_loss"),
        "micro_batch",
        of_training=True,
    ),
}

ATTENTION_FIELDS = {
    "attention_class_name": Field(
        OneOf(features.ATTENTION_CLASS_NAMES), "attention layer to use instead of LitGPT's; the others need it"
    ),
    "attention_sinks": Field(
        Annotated[bool | list[bool], "true or false, or a list of n_layer such entries"],
        "whether the layer learns a sink logit per head",
        _ATTENTION,
        True,
    ),
    "attention_sink_init": Field(
        float,
        "initial value of the sink logits (0 by default, the weight of one token of score 0)",
        (*_ATTENTION, "sinks"),
        of_training=True,
    ),
    "attention_backend": Field(
        OneOf(KERNELS), "the only kernel allowed (the fastest that works by default)", _ATTENTION, of_training=True
    ),
    "attention_dropout": Field(
        Share, "probability of dropping an attention weight in training (0 by default)", _ATTENTION, of_training=True
    ),
    "embedding_dropout": Field(
        Share,
        "probability of dropping an element of the embeddings in training (0 by default)",
        _ATTENTION,
        of_training=True,
    ),
    "position_embedding": Field(
        OneOf(("learned",)), "adds an embedding of the absolute position; needs `rotary_percentage: 0`", _ATTENTION
    ),
    "attention_document_boundary": Field(
        OneOf(("eos", "bos")), "tokens see only their own document, which ends or begins with this token", _ATTENTION
    ),
    "attention_document_token_id": Field(
        NonNegativeInt, "id of that token in the tokenizer", (*_ATTENTION, "documents"), REQUIRED
    ),
    "attention_document_restart_positions": Field(
        bool, "whether positions start at 0 in every document", (*_ATTENTION, "documents"), False
    ),
    "streaming_cache_first": Field(
        NonNegativeInt, "generation of any length: number of first tokens that the cache keeps, usually 4", _ATTENTION
    ),
    "streaming_cache_window": Field(PositiveInt, "number of last tokens that the cache keeps", _ATTENTION),
    "sliding_window_size": _litgpt(
        PositiveInt,
        "number of tokens that a token sees, with itself, where `sliding_window_indices` has a 1 (all by default)",
        _ATTENTION,
    ),
    "norm_qk_type": _litgpt(
        OneOf(("default", "olmo2")), "how queries and keys are normalised, with `norm_qk`", _ATTENTION, unset="default"
    ),
    "clip_qkv": Field(
        PositiveFloat,
        "largest magnitude of queries, keys and values after the projection, and after a norm over all heads, as in "
        "OLMoE and DBRX (no limit by default)",
        _ATTENTION,
    ),
    "attention_scores_scalar": _litgpt(
        PositiveFloat, "attention scores are divided by its root (the head size by default)", _ATTENTION
    ),
    "rope_condense_ratio": _litgpt(PositiveFloat, "positions are divided by it", _ATTENTION, unset=1),
    "rope_base": _litgpt(RotaryBase, "base of the rotary wavelengths, usually 10000", _ATTENTION, unset=10000),
    "rope_local_base_freq": _litgpt(
        RotaryBase, "base of the rotary wavelengths of layers where `rope_indices` has a 1", _ATTENTION
    ),
    "rope_adjustments": _litgpt(
        Annotated[dict, f"a dictionary with keys among {', '.join(rope.KEYS)}"],
        "how the context is extended, as Hugging Face computes it: linear (`factor` alone), Llama-3 or YaRN; or by "
        "dynamic NTK (`dynamic: true`) for texts of `block_size`, where Hugging Face's base follows the length of each "
        "text. LitGPT's attention takes linear and Llama-3, its latent attention all",
        _ATTENTION,
    ),
    "latent_attention": _litgpt(
        type(None),
        "LitGPT's multi-head latent attention (DeepSeek), instead of `SinkAttention` and without its settings",
        _ATTENTION,
    ),
    "attention_logit_softcapping": _litgpt(type(None), "not supported by `SinkAttention`", _ATTENTION),
}

# All of them, in the order in which they are checked: a field comes after those that its owner or range depends on.
FIELDS: dict[str, Field] = {**FEED_FORWARD_FIELDS, **ROUTING_FIELDS, **ATTENTION_FIELDS}

# The fields that only choose what computes a model.
BACKEND_FIELDS = ("expert_backend", "attention_backend")


def added_fields() -> list[str]:
    """Return the names of the fields that LitGPT does not have."""
    return [name for name, field in FIELDS.items() if not field.of_litgpt]


def expert_fields() -> set[str]:
    """Return the names of the fields that have a meaning only for models with experts."""
    return {name for name, field in FIELDS.items() if "moe" in field.owner}


def uses_plugin(config: "Config") -> bool:
    """Return whether a configuration names one of this package's classes or sets one of its fields."""
    return config.mlp_class_name in features.MLP_CLASS_NAMES or any(
        getattr(config, name, None) is not None for name in added_fields()
    )
