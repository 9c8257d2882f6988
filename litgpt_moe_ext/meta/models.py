"""Models on torch's meta device, which have shapes and no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.meta.registrations import asking_again

if TYPE_CHECKING:
    from litgpt.model import GPT

META = torch.device("meta")


class _Uninitialized(TorchFunctionMode):
    """Skips `torch.nn.init`: there is nothing to fill."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def uninitialized() -> Iterator[None]:
    """Leave parameters of modules created in the scope uninitialised, and do without torch's compiler."""
    with without_compiler(), _Uninitialized():
        yield


def meta_model(config: Any, tie_embeddings: bool = False) -> "GPT":
    """Return the model of a `litgpt.Config` on the meta device.

    Args:
        config: The configuration.
        tie_embeddings: Whether output head and token embeddings are one parameter, which `parameters` yields once.
    """
    from litgpt.model import GPT

    with uninitialized(), META:
        model = asking_again(GPT, config)
    if tie_embeddings:
        model.lm_head.weight = model.get_submodule("transformer.wte").get_parameter("weight")
    return model
