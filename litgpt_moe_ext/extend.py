"""Adding routers, auxiliary losses, activations and kernels from another package, as in `examples/`.

A script calls these functions before it starts a training. An installed package can do so in every command, including
plain `litgpt` ones, by naming a function that calls them as an entry point:

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
    """Return the function that adds an expert backend, which, unlike the rest, needs torch."""
    if name not in ("ExpertBackend", "Preference", "register_backend"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from litgpt_moe_ext.moe.kernels import registry

    return getattr(registry, name)


def register_router(name: str, router: RouterType, fields: Mapping[str, Field] | None = None) -> None:
    """Make `router_type: NAME` known, and the configuration fields that the router reads.

    Args:
        name: Its name in configurations.
        router: The router and its features.
        fields: Fields of `litgpt.Config` that the router adds, by name.

    Raises:
        ValueError: If one of the names is taken, or the router or a field is not of its class.
    """
    fields = fields or {}
    require(name, router, RouterType)
    for field_name, field in fields.items():
        require(field_name, field, Field)
    if isinstance(router.router, type):  # otherwise an import path, which is imported on use
        from litgpt_moe_ext.moe.routing.router import Router

        if not issubclass(router.router, Router):
            raise ValueError(
                f"{name!r}: {router.router.__name__} must be a subclass of litgpt_moe_ext.moe.routing.router.Router"
            )
    _add(ROUTERS, name, router)
    for field_name, field in fields.items():
        _add(FIELDS, field_name, field)
    _tell_litgpt()


def register_loss(name: str, loss: Loss) -> None:
    """Make the auxiliary loss NAME known, whose weight is the field `router_NAME_coef`.

    Raises:
        ValueError: If the name is taken, or `loss` is not a `Loss`.
    """
    require(name, loss, Loss)
    if not isinstance(loss.function, str) and not callable(loss.function):
        raise ValueError(f"{name!r}: function is {loss.function!r}; it must be a function or its path")
    if isinstance(loss.inputs, str):  # would be taken for a sequence of letters
        raise ValueError(f"{name!r}: inputs is {loss.inputs!r}; it must be a tuple of names, ({loss.inputs!r},)")
    _add(LOSSES, name, loss)
    _add(FIELDS, loss_field(name), loss_weight(loss))
    _tell_litgpt()


def register_activation(name: str, activation: ActivationType) -> None:
    """Make `mlp_activation: NAME` known.

    Raises:
        ValueError: If the name is taken, or `activation` is not an `ActivationType`.
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
    """Call the functions that installed packages name as entry points `litgpt_moe_ext.extensions`, once per process.

    An entry point in a module that is still being imported, as when that module imports LitGPT, is left to the next
    call. A failure is only a warning, because every command of the environment calls it and most do not need it.
    """
    for entry_point in entry_points(group="litgpt_moe_ext.extensions"):
        key = entry_point.name, entry_point.value
        if key in _called or is_initializing(entry_point.value.partition(":")[0].strip()):
            continue
        _called.add(key)
        try:
            entry_point.load()()
        except (Exception, SystemExit) as error:  # foreign code may raise anything, or exit
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
