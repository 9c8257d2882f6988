"""What a configuration may say about feed-forward and MoE layers, checked without importing torch."""

from typing import Any, Literal, get_args

MLP_CLASS_NAMES = ("SharedExpertMoE", "NoisyTopKMoE", "FeedForward")
MOE_CLASS_NAMES = ("SharedExpertMoE", "NoisyTopKMoE")

# What may compute the routed experts (`litgpt_moe_ext.moe.kernels.choice`); a registered backend adds its name.
EXPERT_BACKENDS = ["loop", "grouped_cpu", "grouped_mm", "triton"]

_ActivationName = Literal["swiglu", "geglu", "gelu", "relu", "relu2"]
_RouterType = Literal["topk", "hash", "uniform"]
_ScoreFunction = Literal["sigmoid", "softmax"]

# Fields of this plugin in `litgpt.Config`; None unless set.
FIELDS: dict[str, Any] = {
    # Activation of experts, shared experts, dense layers, and of `FeedForward` (default: swiglu).
    "mlp_activation": _ActivationName | None,
    # Probability of dropping a hidden activation of an expert (default: 0).
    "expert_dropout": float | None,
    # The only implementation of the experts allowed (default: the fastest that works): loop, grouped_cpu, grouped_mm
    # or triton.
    "expert_backend": str | None,
    # Width of the shared experts together, instead of n_shared_expert times the width of an expert.
    "shared_expert_intermediate_size": int | None,
    # Whether a sigmoid gate weighs the shared experts, as in Qwen2-MoE (default: false).
    "shared_expert_gate": bool | None,
    # Of how many layers after `first_k_dense_replace` one is an MoE layer, the last of them (default: 1).
    "decoder_sparse_step": int | None,
    # How `SharedExpertMoE` chooses experts: by score, or without learning by token id or at random (default: topk).
    "router_type": _RouterType | None,
    # How router logits become scores (default: sigmoid, as DeepSeek-V3).
    "router_score_function": _ScoreFunction | None,
    # Training multiplies the router's input by random factors from 1 - this to 1 + this (default: 0).
    "router_jitter_noise": float | None,
    # Step size of the auxiliary-loss-free balancing bias (default: 0.001; 0 switches it off), and how it changes:
    # warmup_steps, decay_start and decay_steps in optimizer steps.
    "router_bias_update_rate": float | None,
    "router_bias_update_schedule": dict | None,
    # Weights of auxiliary losses (default: 0, but 0.1 for the last two of `NoisyTopKMoE`, as in the paper).
    "router_load_balancing_loss_coef": float | None,
    "router_sequence_balancing_loss_coef": float | None,
    "router_z_loss_coef": float | None,
    "router_importance_loss_coef": float | None,
    "router_load_loss_coef": float | None,
}

_LOSS_COEFS = tuple(name for name in FIELDS if name.endswith("_loss_coef"))
_BIAS_FIELDS = ("router_bias_update_rate", "router_bias_update_schedule")
_LEARNED_ONLY = ("router_score_function", "router_jitter_noise", *_BIAS_FIELDS, *_LOSS_COEFS)
_GROUP_FIELDS = ("n_topk_groups", "n_topk_scores_per_group")
_SCHEDULE_KEYS = ("warmup_steps", "decay_start", "decay_steps")
# LitGPT's own fields that only MoE layers read.
_LITGPT_MOE_FIELDS = {
    "n_expert": 0,
    "n_expert_per_token": 0,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "moe_intermediate_size": None,
    "first_k_dense_replace": None,
}


def resolve_mlp_fields(config: Any) -> None:
    """Fill in class defaults and check the settings of feed-forward and MoE layers, in place.

    Args:
        config: A `litgpt.Config` whose fields are set but whose derived fields need not be.

    Raises:
        ValueError: If settings contradict each other or name something the chosen class does not have. The message
            names the field, its value and what would be right.
    """
    name = config.mlp_class_name
    if name in MOE_CLASS_NAMES:
        _resolve_activation(config)
        _check_experts(config)
        _check_shared_experts(config)
        _check_layer_pattern(config)
        if name == "SharedExpertMoE":
            _check_groups(config)
            _resolve_shared_expert_router(config)
        else:
            _resolve_noisy_router(config)
    elif name == "FeedForward":
        _resolve_activation(config)
        for field in FIELDS:
            if field != "mlp_activation":
                _refuse(config, field, "mlp_class_name: FeedForward is a dense layer")
        for field, unset in _LITGPT_MOE_FIELDS.items():
            _refuse(config, field, "mlp_class_name: FeedForward is a dense layer", unset)
        _require_integer(config, "intermediate_size", 1, None, "the hidden size of FeedForward")
    else:
        for field in FIELDS:
            _refuse(config, field, f"mlp_class_name: {name} has no such setting")


def _refuse(config: Any, name: str, reason: str, unset: Any = None) -> None:
    value = getattr(config, name)
    if value != unset:
        raise ValueError(
            f"{name}: {value!r} would be ignored because {reason}. Remove it from the model configuration."
        )


def _require_integer(config: Any, name: str, low: int, high: int | None, why: str) -> None:
    value = getattr(config, name)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        limits = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name}: {value!r} must be {limits} ({why})")


def _resolve_choice(config: Any, name: str, choices: Any, default: str) -> None:
    if getattr(config, name) is None:
        setattr(config, name, default)
    value = getattr(config, name)
    if value not in get_args(choices):
        raise ValueError(f"{name}: {value!r} is unknown; choose from {', '.join(get_args(choices))}")


def _resolve_number(config: Any, name: str, default: float, zero: str) -> None:
    if getattr(config, name) is None:
        setattr(config, name, default)
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: {value!r} must be a number of at least 0 ({zero})")


def _check_fraction(config: Any, name: str, why: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}: {value!r} must be a number from 0 to less than 1 ({why})")


def _resolve_activation(config: Any) -> None:
    _resolve_choice(config, "mlp_activation", _ActivationName, "swiglu")
    if config.mlp_activation not in ("gelu", "geglu"):
        _refuse(config, "gelu_approximate", f"mlp_activation is {config.mlp_activation}", unset="none")


def _check_experts(config: Any) -> None:
    name = config.mlp_class_name
    _require_integer(config, "n_expert", 1, None, f"the number of routed experts of {name}")
    _require_integer(config, "n_expert_per_token", 1, config.n_expert, f"top-k; n_expert is {config.n_expert}")
    if config.moe_intermediate_size is None:
        if config.intermediate_size is None:
            raise ValueError(
                f"moe_intermediate_size: None must be set for {name}: it is the hidden size of one expert "
                "(intermediate_size is used for it if moe_intermediate_size is left out)"
            )
        config.moe_intermediate_size = config.intermediate_size
    _require_integer(config, "moe_intermediate_size", 1, None, "the hidden size of one expert")
    _check_fraction(config, "expert_dropout", "the probability of dropping a hidden activation of an expert")
    if config.expert_backend not in (None, *EXPERT_BACKENDS):
        raise ValueError(
            f"expert_backend: {config.expert_backend!r} is unknown; choose from {', '.join(EXPERT_BACKENDS)}, or leave "
            "it out, and the fastest that works is chosen"
        )


def _check_shared_experts(config: Any) -> None:
    if config.n_shared_expert is not None:
        _require_integer(config, "n_shared_expert", 0, None, "the number of experts every token visits")
    if not config.n_shared_expert:
        _refuse(config, "shared_expert_intermediate_size", "n_shared_expert is not set")
        _refuse(config, "shared_expert_gate", "n_shared_expert is not set")
    elif config.shared_expert_intermediate_size is not None:
        why = "the width of all shared experts together"
        _require_integer(config, "shared_expert_intermediate_size", 1, None, why)


def _check_layer_pattern(config: Any) -> None:
    dense_layers = ""
    if config.first_k_dense_replace is not None:
        _require_integer(config, "first_k_dense_replace", 0, config.n_layer, "how many first layers are dense")
        if config.first_k_dense_replace:
            dense_layers = f"first_k_dense_replace is {config.first_k_dense_replace}"
    if config.decoder_sparse_step is not None:
        _require_integer(config, "decoder_sparse_step", 1, config.n_layer, "every how many layers is an MoE layer")
        if config.decoder_sparse_step > 1:
            dense_layers = f"decoder_sparse_step is {config.decoder_sparse_step}"
    if dense_layers and config.intermediate_size is None:
        raise ValueError(
            f"intermediate_size: None must be set because {dense_layers}: it is the hidden size of the dense layers"
        )


def is_dense_layer(config: Any, block_idx: int) -> bool:
    """Whether block `block_idx` of a model whose class is an MoE has a dense layer in its place."""
    if config.mlp_class_name not in MOE_CLASS_NAMES:
        return False
    index = block_idx - (config.first_k_dense_replace or 0)
    return index < 0 or bool((index + 1) % (config.decoder_sparse_step or 1))


def _check_groups(config: Any) -> None:
    if config.n_expert_groups is None:
        for field in _GROUP_FIELDS:
            _refuse(config, field, "n_expert_groups is not set")
        return
    if not isinstance(config.n_expert_groups, int) or config.n_expert_groups < 2:
        raise ValueError(
            f"n_expert_groups: {config.n_expert_groups!r} must be an integer of at least 2, or left out for routing "
            "without groups"
        )
    if config.n_expert % config.n_expert_groups:
        raise ValueError(
            f"n_expert_groups: {config.n_expert_groups} must divide n_expert: {config.n_expert}; choose one of "
            f"{[g for g in range(2, config.n_expert + 1) if config.n_expert % g == 0]}"
        )
    group_size = config.n_expert // config.n_expert_groups
    _require_integer(config, "n_topk_groups", 1, config.n_expert_groups, "how many groups a token may choose from")
    _require_integer(config, "n_topk_scores_per_group", 1, group_size, "how many of its scores stand for a group")
    reachable = config.n_topk_groups * group_size
    if config.n_expert_per_token > reachable:
        raise ValueError(
            f"n_expert_per_token: {config.n_expert_per_token} is more than the {config.n_topk_groups} chosen groups of "
            f"{group_size} experts hold; use at most {reachable}, or raise n_topk_groups"
        )


def _resolve_shared_expert_router(config: Any) -> None:
    _resolve_choice(config, "router_type", _RouterType, "topk")
    _refuse(config, "router_load_loss_coef", "SharedExpertMoE has no noise to estimate the load by")
    if config.router_type != "topk":
        reason = f"router_type: {config.router_type} does not learn"
        for name in (*_LEARNED_ONLY, "n_expert_groups"):
            _refuse(config, name, reason)
        _refuse(config, "norm_topk_prob", f"{reason}; its weights sum to 1", unset=False)
        return
    _resolve_choice(config, "router_score_function", _ScoreFunction, "sigmoid")
    _resolve_number(config, "router_bias_update_rate", 0.001, "0 switches balancing off")
    _check_bias_schedule(config)
    _check_fraction(config, "router_jitter_noise", "the largest relative change of the router's input")
    for name in _LOSS_COEFS:
        if getattr(config, name) is not None:
            _resolve_number(config, name, 0.0, "0 switches this loss off")


def _check_bias_schedule(config: Any) -> None:
    schedule = config.router_bias_update_schedule
    if schedule is None:
        return
    if not config.router_bias_update_rate:
        _refuse(config, "router_bias_update_schedule", "router_bias_update_rate is 0")
    if not isinstance(schedule, dict) or not schedule or set(schedule) - set(_SCHEDULE_KEYS):
        raise ValueError(
            f"router_bias_update_schedule: {schedule!r} must have keys among {', '.join(_SCHEDULE_KEYS)}, all in "
            "optimizer steps"
        )
    for key, value in schedule.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"router_bias_update_schedule.{key}: {value!r} must be an integer of at least 0")
    if "decay_steps" in schedule and "decay_start" not in schedule:
        raise ValueError(
            f"router_bias_update_schedule.decay_steps: {schedule['decay_steps']} needs decay_start, the step from "
            "which the rate falls"
        )


def _resolve_noisy_router(config: Any) -> None:
    for name in ("n_expert_groups", *_GROUP_FIELDS):
        _refuse(config, name, "NoisyTopKMoE routes without groups; SharedExpertMoE has them")
    _refuse(config, "router_type", "NoisyTopKMoE has one kind of router")
    _refuse(config, "router_score_function", "NoisyTopKMoE always takes the softmax of the k highest noisy logits")
    for name in _BIAS_FIELDS:
        _refuse(config, name, "NoisyTopKMoE is balanced by losses instead of a bias")
    _refuse(config, "norm_topk_prob", "NoisyTopKMoE's weights always sum to 1", unset=False)
    _check_fraction(config, "router_jitter_noise", "the largest relative change of the router's input")
    defaults = {"router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1}
    if config.n_expert_per_token == config.n_expert:
        if config.router_load_loss_coef == 0:
            config.router_load_loss_coef = None
        _refuse(config, "router_load_loss_coef", "every token visits every expert")
        del defaults["router_load_loss_coef"]
    for name in _LOSS_COEFS:
        if name in defaults or getattr(config, name) is not None:
            _resolve_number(config, name, defaults.get(name, 0.0), "0 switches this loss off")
