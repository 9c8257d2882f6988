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
from typing import Any, get_args

from litgpt_moe_ext.config import attention, moe
from litgpt_moe_ext.config.moe import MLP_CLASS_NAMES

EXTRA_FIELDS: dict[str, Any] = {
    **attention.FIELDS,
    **moe.FIELDS,
    # Probability of dropping an element of what a layer adds to the residual stream (default: 0).
    "residual_dropout": float | None,
}


def uses_plugin(config: Any) -> bool:
    """Whether `config` (a `litgpt.Config`) names one of this plugin's classes or sets one of its fields."""
    return config.mlp_class_name in MLP_CLASS_NAMES or any(
        getattr(config, name, None) is not None for name in EXTRA_FIELDS
    )


def resolve_and_validate(config: Any) -> None:
    """Fill in class defaults and check the plugin's part of a configuration, in place.

    Args:
        config: A `litgpt.Config` whose fields are set but whose derived fields need not be.

    Raises:
        ValueError: If settings contradict each other or name something the chosen class does not have. The message
            names the field, its value and what would be right.
    """
    moe.resolve_mlp_fields(config)
    attention.resolve_attention_fields(config)
    _check_residual_dropout(config)


def _check_residual_dropout(config: Any) -> None:
    value = config.residual_dropout
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"residual_dropout: {value!r} must be a number from 0 to less than 1")
    for name in ("post_attention_norm", "post_mlp_norm"):
        if getattr(config, name):
            raise ValueError(f"residual_dropout: {value!r} cannot be combined with {name}: true; remove one of them")


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
        # LitGPT asserts that only its own MoE class has leading dense layers; ours are made by the plugin.
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
