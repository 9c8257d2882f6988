"""The fields this plugin adds to `litgpt.Config`, and the rules a configuration must keep.

Every added field is `None` unless set, so that a configuration which uses none of them is saved without them and
stays readable by plain LitGPT. Where a class needs a value, `resolve_and_validate` fills in the class's default, so
that a saved model configuration states what it was trained with.

Nothing here imports torch or LitGPT: the rules work on any object that has the fields.
"""

import dataclasses
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal, get_args

from litgpt_moe_ext.attention import validation as attention

MLP_CLASS_NAMES = ("SharedExpertMoE", "NoisyTopKMoE")

SCORE_FUNCTIONS = ("sigmoid", "softmax")

EXTRA_FIELDS: dict[str, Any] = {
    **attention.FIELDS,
    # How `SharedExpertMoE` turns router logits into scores (default: sigmoid, as DeepSeek-V3).
    "router_score_function": Literal["sigmoid", "softmax"] | None,
    # Step size of `SharedExpertMoE`'s auxiliary-loss-free balancing bias (default: 0.001; 0 switches balancing off).
    "router_bias_update_rate": float | None,
    # Weights of `NoisyTopKMoE`'s two balancing losses (default: 0.1 each, as in the paper; 0 switches one off).
    "router_importance_loss_coef": float | None,
    "router_load_loss_coef": float | None,
}

# Fields that mean something to one of the two MoE classes only.
_SHARED_EXPERT_ONLY = ("router_score_function", "router_bias_update_rate")
_NOISY_ONLY = ("router_importance_loss_coef", "router_load_loss_coef")
_GROUP_FIELDS = ("n_topk_groups", "n_topk_scores_per_group")


def uses_plugin(config: Any) -> bool:
    """Whether `config` (a `litgpt.Config`) names one of this plugin's classes."""
    return config.mlp_class_name in MLP_CLASS_NAMES or config.attention_class_name is not None


def resolve_and_validate(config: Any) -> None:
    """Fill in class defaults and check the plugin's part of a configuration, in place.

    Args:
        config: A `litgpt.Config` whose fields are set but whose derived fields need not be.

    Raises:
        ValueError: If settings contradict each other or name something the chosen class does not have. The message
            names the field, its value and what would be right.
    """
    if config.mlp_class_name == "SharedExpertMoE":
        _check_experts(config)
        _check_groups(config)
        _resolve_shared_expert_router(config)
        foreign = _NOISY_ONLY
    elif config.mlp_class_name == "NoisyTopKMoE":
        _check_experts(config)
        _resolve_noisy_router(config)
        foreign = ()
    else:
        foreign = _SHARED_EXPERT_ONLY + _NOISY_ONLY
    for name in foreign:
        _refuse(config, name, f"mlp_class_name: {config.mlp_class_name} has no such setting")
    attention.resolve_attention_fields(config)


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


def _check_experts(config: Any) -> None:
    name = config.mlp_class_name
    _require_integer(config, "n_expert", 1, None, f"the number of routed experts of {name}")
    _require_integer(config, "n_expert_per_token", 1, config.n_expert, f"top-k; n_expert is {config.n_expert}")
    if config.n_shared_expert is not None:
        _require_integer(config, "n_shared_expert", 0, None, "the number of experts every token visits")
    if config.moe_intermediate_size is None:
        if config.intermediate_size is None:
            raise ValueError(
                f"moe_intermediate_size: None must be set for {name}: it is the hidden size of one expert "
                "(intermediate_size is used for it if moe_intermediate_size is left out)"
            )
        config.moe_intermediate_size = config.intermediate_size
    _require_integer(config, "moe_intermediate_size", 1, None, "the hidden size of one expert")
    if config.first_k_dense_replace is not None:
        _require_integer(config, "first_k_dense_replace", 0, config.n_layer, "how many first layers are dense")
        if config.first_k_dense_replace and config.intermediate_size is None:
            raise ValueError(
                f"intermediate_size: None must be set because first_k_dense_replace is {config.first_k_dense_replace}: "
                "it is the hidden size of the dense layers"
            )
    _refuse(config, "gelu_approximate", f"the experts of {name} use SwiGLU", unset="none")


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
    if config.router_score_function is None:
        config.router_score_function = "sigmoid"
    if config.router_score_function not in SCORE_FUNCTIONS:
        raise ValueError(
            f"router_score_function: {config.router_score_function!r} is unknown; choose from "
            f"{', '.join(SCORE_FUNCTIONS)}"
        )
    _resolve_number(config, "router_bias_update_rate", 0.001, "0 switches balancing off")


def _resolve_number(config: Any, name: str, default: float, zero: str) -> None:
    if getattr(config, name) is None:
        setattr(config, name, default)
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: {value!r} must be a number of at least 0 ({zero})")


def _resolve_noisy_router(config: Any) -> None:
    for name in ("n_expert_groups", *_GROUP_FIELDS):
        _refuse(config, name, "NoisyTopKMoE routes without groups; SharedExpertMoE has them")
    _refuse(config, "router_score_function", "NoisyTopKMoE always takes the softmax of the k highest noisy logits")
    _refuse(config, "router_bias_update_rate", "NoisyTopKMoE is balanced by two losses instead of a bias")
    _refuse(config, "norm_topk_prob", "NoisyTopKMoE's weights always sum to 1", unset=False)
    for name in _NOISY_ONLY:
        _resolve_number(config, name, 0.1, "0 switches this loss off")


def extend_config(config_class: type, validate_attention: Callable[[Any], None]) -> None:
    """Add the fields and rules to a dataclass (`litgpt.Config`) in place, and to its subclasses.

    LitGPT imports `Config` by name in many modules, so the class object itself must change; `dataclasses.dataclass` is
    run on it again with the longer list of annotations.

    Args:
        config_class: The class to extend. Extending it a second time changes nothing.
        validate_attention: Called with every configuration that names one of the plugin's attention classes.
    """
    if "attention_class_name" in config_class.__dataclass_fields__:
        return
    annotations = config_class.__annotations__
    mlp_class_names = (*get_args(annotations["mlp_class_name"]), *MLP_CLASS_NAMES)
    # Checked below instead of by type, which gives a message that names the choices.
    annotations["mlp_class_name"] = str
    for name, annotation in EXTRA_FIELDS.items():
        annotations[name] = annotation
        setattr(config_class, name, None)

    original_post_init = config_class.__post_init__

    def __post_init__(self: Any) -> None:
        if self.mlp_class_name not in mlp_class_names and not hasattr(
            sys.modules.get("litgpt.model"), self.mlp_class_name
        ):
            raise ValueError(
                f"mlp_class_name: {self.mlp_class_name!r} is unknown; choose from {', '.join(mlp_class_names)}"
            )
        resolve_and_validate(self)
        # LitGPT asserts that only its own MoE class has leading dense layers.
        first_k_dense_replace = self.first_k_dense_replace
        if self.mlp_class_name in MLP_CLASS_NAMES:
            self.first_k_dense_replace = None
        try:
            original_post_init(self)
        except AssertionError as error:
            # LitGPT's assertions have no text.
            raise AssertionError(_explain_assertion(self, error)) from error
        finally:
            self.first_k_dense_replace = first_k_dense_replace
        if self.attention_class_name is not None:
            validate_attention(self)

    config_class.__post_init__ = __post_init__
    for cls in (config_class, *_subclasses(config_class)):
        _rebuild_dataclass(cls)


def _explain_assertion(config: Any, error: AssertionError) -> str:
    if error.args:
        return str(error)
    condition = (traceback.extract_tb(error.__traceback__)[-1].line or "").removeprefix("assert ").replace("self.", "")
    names = dict.fromkeys(name for name in re.findall(r"\w+", condition) if hasattr(config, name))
    values = ", ".join(f"{name}: {getattr(config, name)!r}" for name in names)
    return f"{values} must fulfil {condition}" if names else f"model configuration {config.name!r} is contradictory"


def _subclasses(cls: type) -> list[type]:
    direct = cls.__subclasses__()
    return direct + [deeper for subclass in direct for deeper in _subclasses(subclass)]


def _rebuild_dataclass(cls: type) -> None:
    # `dataclass` removed these defaults from the class when it first ran; it must find them again.
    for name, field in cls.__dataclass_fields__.items():
        if name in cls.__dict__.get("__annotations__", {}) and field.default_factory is not dataclasses.MISSING:
            setattr(cls, name, field)
    for method in ("__init__", "__repr__", "__eq__"):
        if method in cls.__dict__:
            delattr(cls, method)
    dataclasses.dataclass(cls)


def without_unused_fields(config_fields: dict[str, Any]) -> dict[str, Any]:
    """Drop the plugin's fields that are not set from a configuration turned into a dictionary."""
    return {name: value for name, value in config_fields.items() if name not in EXTRA_FIELDS or value is not None}
