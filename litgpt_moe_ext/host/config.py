"""Adding this package's fields and rules to `litgpt.Config`.

Every added field is `None` unless set, so that a configuration that uses none of them is saved without them and stays
readable by plain LitGPT. Where a class needs a value, its default is filled in, so that a saved model configuration
records what the model was trained with. The fields and rules themselves are in `litgpt_moe_ext.config`.
"""

import dataclasses
import linecache
import re
import sys
import traceback
from typing import Any, get_args

from litgpt_moe_ext.config.features import MLP_CLASS_NAMES
from litgpt_moe_ext.config.fields import BACKEND_FIELDS, FIELDS, added_fields
from litgpt_moe_ext.config.rules import check_derived, resolve
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import members, without_range


def fields_to_save(config_fields: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, as a dictionary, without the added fields that are not set or that name a backend.

    A backend is chosen for one machine: weights trained with a GPU's kernel must run on a CPU, and without the
    extension that added the kernel. `hyperparameters.yaml` records the backend that a run was forced to use.
    """
    left_out = {*BACKEND_FIELDS, *(name for name in added_fields() if config_fields.get(name) is None)}
    return {name: value for name, value in config_fields.items() if name not in left_out}


def extend_config(config_class: type) -> None:
    """Add the fields and rules to a dataclass (`litgpt.Config`) in place, and to its subclasses.

    LitGPT imports `Config` by name in many modules, so the class itself must change.

    Args:
        config_class: The class to extend. Extending it again adds fields registered in the meantime.
    """
    if "attention_class_name" not in config_class.__dataclass_fields__:
        _add_rules(config_class)
    _add_fields(config_class)


def _add_fields(config_class: type) -> None:
    new = [name for name in added_fields() if name not in config_class.__dataclass_fields__]
    for name in new:
        config_class.__annotations__[name] = without_range(FIELDS[name].type) | None
        setattr(config_class, name, None)
    if new:
        for cls in (config_class, *_subclasses(config_class)):
            _rebuild_dataclass(cls)


def _add_rules(config_class: type) -> None:
    annotations = config_class.__annotations__
    mlp_class_names = (*get_args(annotations["mlp_class_name"]), *MLP_CLASS_NAMES)
    # Checked below instead of by type, with a message that names the choices.
    annotations["mlp_class_name"] = str
    for name, field in FIELDS.items():
        # LitGPT computes with any rotary base, but its parsers would take an integer only.
        if field.of_litgpt and without_range(field.type) is float and float not in members(annotations[name]):
            annotations[name] |= float
    original_post_init = config_class.__post_init__

    def __post_init__(self: Any) -> None:
        if self.mlp_class_name not in mlp_class_names and not hasattr(
            sys.modules.get("litgpt.model"), self.mlp_class_name
        ):
            raise SettingsError(
                f"mlp_class_name: {self.mlp_class_name!r} is unknown; choose from {', '.join(mlp_class_names)}"
            )
        resolve(self)
        # LitGPT asserts that only its own MoE class has leading dense layers; ours are made by the plugin.
        first_k_dense_replace = self.first_k_dense_replace
        if self.mlp_class_name in MLP_CLASS_NAMES:
            self.first_k_dense_replace = None
        try:
            original_post_init(self)
        except AssertionError as error:
            # LitGPT's assertions name no values, and most have no text.
            raise SettingsError(_explain_assertion(self, error)) from error
        finally:
            self.first_k_dense_replace = first_k_dense_replace
        check_derived(self)

    config_class.__post_init__ = __post_init__


def _explain_assertion(config: Any, error: AssertionError) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    first, last = where.lineno or 1, where.end_lineno or where.lineno or 0
    source = " ".join(line.strip() for line in linecache.getlines(where.filename)[first - 1 : last])
    condition = source.removeprefix("assert ").replace("self.", "")
    names = dict.fromkeys(name for name in re.findall(r"\w+", condition) if hasattr(config, name))
    values = ", ".join(f"{name}: {getattr(config, name)!r}" for name in names)
    if not names:
        return str(error) or f"model configuration {config.name!r} is contradictory"
    return f"{values} must fulfil {condition}"


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
