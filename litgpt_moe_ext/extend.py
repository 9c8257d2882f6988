"""Adding routers, auxiliary losses, activations and kernels from another package, as in `examples/`.

A script calls these functions before it starts a training. A package that is installed can do so in every command,
plain `litgpt` ones included, by naming a function that calls them as an entry point:

```toml
[project.entry-points."litgpt_moe_ext.extensions"]
my_package = "my_package.routers:register"
```
"""

import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.attention.kernels.kernel import AttentionKernel
from litgpt_moe_ext.attention.kernels.registry import register_kernel
from litgpt_moe_ext.config.fields import FIELDS, Field, loss_weight
from litgpt_moe_ext.entries import require
from litgpt_moe_ext.errors import one_line
from litgpt_moe_ext.host.autoload import is_initializing
from litgpt_moe_ext.moe.registry import (
    ACTIVATIONS,
    LOSSES,
    ROUTERS,
    ActivationType,
    Loss,
    RouterType,
    loss_field,
)

if TYPE_CHECKING:
    from litgpt_moe_ext.moe.kernels.backend import ExpertBackend, Preference
    from litgpt_moe_ext.moe.kernels.registry import register_backend

__all__ = [
    "ActivationType",
    "AttentionKernel",
    "ExpertBackend",
    "Field",
    "Loss",
    "Preference",
    "RouterType",
    "register_activation",
    "register_backend",
    "register_kernel",
    "register_loss",
    "register_router",
]

_called: set[tuple[str, str]] = set()  # names and values of entry points


def __getattr__(name: str) -> Any:
    """Return what adds an expert backend, which needs torch, unlike the rest."""
    if name not in ("ExpertBackend", "Preference", "register_backend"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from litgpt_moe_ext.moe.kernels import registry

    return getattr(registry, name)


def register_router(name: str, router: RouterType, fields: Mapping[str, Field] | None = None) -> None:
    """Make `router_type: NAME` known, and the configuration fields that the router reads.

    Args:
        name: What configurations call it.
        router: The router and what it has.
        fields: Fields of `litgpt.Config` that the router adds, by name.

    Raises:
        ValueError: If something else has one of the names already, or a router or field is not of its class.
    """
    fields = fields or {}
    require(name, router, RouterType)
    for field_name, field in fields.items():
        require(field_name, field, Field)
    if isinstance(router.router, type):  # or else the path of one, which is imported when it is used
        from litgpt_moe_ext.moe.router import Router

        if not issubclass(router.router, Router):
            raise ValueError(
                f"{name!r}: {router.router.__name__} must be a subclass of litgpt_moe_ext.moe.router.Router"
            )
    _add(ROUTERS, name, router)
    for field_name, field in fields.items():
        _add(FIELDS, field_name, field)
    _tell_litgpt()


def register_loss(name: str, loss: Loss) -> None:
    """Make the auxiliary loss NAME known, whose weight is the field `router_NAME_coef`.

    Raises:
        ValueError: If something else has the name already, or what is given is no `Loss`.
    """
    require(name, loss, Loss)
    if not isinstance(loss.function, str) and not callable(loss.function):
        raise ValueError(f"{name!r}: function is {loss.function!r}; it must be a function or its path")
    if isinstance(loss.inputs, str):  # which would be letters
        raise ValueError(f"{name!r}: inputs is {loss.inputs!r}; it must be a tuple of names, ({loss.inputs!r},)")
    _add(LOSSES, name, loss)
    _add(FIELDS, loss_field(name), loss_weight(loss))
    _tell_litgpt()


def register_activation(name: str, activation: ActivationType) -> None:
    """Make `mlp_activation: NAME` known.

    Raises:
        ValueError: If something else has the name already, or what is given is no `ActivationType`.
    """
    require(name, activation, ActivationType)
    for field_name in ("function", "tanh", "up"):
        function = getattr(activation, field_name)
        if callable(function) and not hasattr(function, "forward_into"):
            raise ValueError(
                f"{name!r}: {field_name} is a bare function; it must be a Pointwise of it, which is in "
                "litgpt_moe_ext.moe.activations"
            )
    _add(ACTIVATIONS, name, activation)


def load_extensions() -> None:
    """Call the functions that installed packages name as entry points `litgpt_moe_ext.extensions`, once in a process.

    One in a module that is on its way, as a script imports it and it imports LitGPT, is left to the next call. One that
    fails is a warning: every command of the environment calls it, most of which need nothing of it.
    """
    for entry_point in entry_points(group="litgpt_moe_ext.extensions"):
        key = entry_point.name, entry_point.value
        if key in _called or is_initializing(entry_point.value.partition(":")[0].strip()):
            continue
        _called.add(key)
        try:
            entry_point.load()()
        except (Exception, SystemExit) as error:  # whatever somebody else's code raises, a script that ends itself too
            reason = f"{type(error).__name__}: {one_line(error)}"
            warnings.warn(
                f"the extension {entry_point.name} ({entry_point.value}) is skipped: {reason}",
                RuntimeWarning,
                stacklevel=1,
            )


def _add(registry: dict, name: str, entry: object) -> None:
    # Adding the same twice is not a conflict: a script may call the entry point of its own installed package.
    if registry.get(name, entry) != entry:
        raise ValueError(f"{name!r} is registered already; choose another name")
    registry[name] = entry


def _tell_litgpt() -> None:
    # Fields that are registered before LitGPT is imported are added with all others.
    litgpt_config = sys.modules.get("litgpt.config")
    if hasattr(litgpt_config, "Config") and "attention_class_name" in litgpt_config.Config.__dataclass_fields__:
        from litgpt_moe_ext.host.config import extend_config

        extend_config(litgpt_config.Config)
