"""What CUDA graphs do, on a CPU: passes that run again on the same tensors, and add gradients where they did.

`Recordings` are true to them: operators run again, and nothing of Python. A model that waits for the device, as most do
on a CPU, has none; `Reruns` are for it.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt_moe_ext.moe.kernels import step_weights
from litgpt_moe_ext.training.steps.graphs.capture import Loss, Passes, gradients_set_aside, leaves_of
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import Replay

# Their results, or the sizes of these, are known to the host only after the device has answered.
LOOKS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class _Functions:
    """Makes functions that run their operators again, on the tensors that they had."""

    def function(self, function: Callable[[], Tensor | None]) -> Replay:
        """See `Capture.function`."""
        recording = _Recording(undone=True)
        with torch.random.fork_rng(devices=[]), recording:
            result = function()
        recording.forget()
        return Replay(recording.replay, result)


class Recordings(_Functions):
    """Makes passes that run the operators of the loss function again, on the tensors that they had."""

    def __init__(self) -> None:
        self.captured = 0

    def forward(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Replay:
        return self.function(partial(loss, ids_BT, targets_BT))

    def passes(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        self.captured += 1
        forward, backward = _Recording(), _Recording()
        with torch.random.fork_rng(devices=[]):
            with forward:
                value = loss(ids_BT, targets_BT)
            scale, leaves = torch.ones_like(value), leaves_of(value)
            before = [(leaf.grad, leaf.grad.clone()) for leaf in leaves if add and leaf.grad is not None]
            with gradients_set_aside(leaves, keep=add):
                with backward:
                    value.backward(scale)
                gradients = {leaf: leaf.grad for leaf in leaves if leaf.grad is not None}
        static = value.detach()
        for recording in (forward, backward):
            recording.forget()
        for gradient, content in before:
            gradient.copy_(content)
        return Passes(forward.replay, backward.replay, static, scale, gradients)


class _Recording(TorchDispatchMode):
    """Notes the operators of a scope.

    Args:
        undone: Whether tensors that were there before have their contents again once what was computed is forgotten.
    """

    def __init__(self, undone: bool = False) -> None:
        super().__init__()
        self._undone, self._before = undone, list[tuple[Tensor, Tensor]]()
        self._calls: list[tuple[Any, tuple, dict[str, Any], list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in LOOKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self._undone and func._schema.is_mutable:
            self._before += [(tensor.detach(), tensor.detach().clone()) for tensor in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        made = [None if _memory(tensor) in given else tensor for tensor in _tensors(result)]
        if func._schema.is_mutable or any(tensor is not None for tensor in made):  # and not a view alone
            self._calls.append((func, args, kwargs, made))
        return result

    def forget(self) -> None:
        """Leave nothing that was computed where a replay should write."""
        for *_, made in self._calls:
            for tensor in made:
                if tensor is not None:
                    tensor.detach().fill_(torch.nan if tensor.is_floating_point() else 0)
        for tensor, content in reversed(self._before):
            tensor.copy_(content)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Reruns(_Functions):
    """Makes passes that run the loss function again."""

    def __init__(self) -> None:
        self.captured = self.validations = 0

    def forward(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Replay:
        self.validations += 1
        with torch.random.fork_rng():
            static = torch.full_like(loss(ids_BT, targets_BT), torch.nan)
        return Replay(lambda: static.copy_(loss(ids_BT, targets_BT)), static)

    def passes(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        self.captured += 1
        # What was shared when a graph was captured is so when it is replayed.
        shared = contextlib.nullcontext if (weights := step_weights._sharing) is None else weights.shared
        with torch.random.fork_rng():
            value = loss(ids_BT, targets_BT)
        static, scale, latest = value.detach().clone(), torch.ones_like(value), []
        kept = {leaf: leaf.grad for leaf in leaves_of(value)}
        for leaf in kept:
            leaf.grad = None
        value.backward(scale)
        for leaf, grad in kept.items():
            leaf.grad = grad
        if not add:
            kept = dict.fromkeys(kept)
        gradients = {leaf: torch.full_like(leaf, torch.nan) if grad is None else grad for leaf, grad in kept.items()}

        def forward() -> None:
            with shared():
                latest[:] = [loss(ids_BT, targets_BT)]
            static.copy_(latest[0].detach())

        def backward() -> None:
            with shared():
                found = torch.autograd.grad(latest.pop(), list(gradients), scale, allow_unused=True)
            for (leaf, total), new in zip(gradients.items(), found, strict=True):
                if kept[leaf] is None:
                    total.copy_(new)
                elif new is not None:  # otherwise a product has added it
                    total.add_(new)

        return Passes(forward, backward, static, scale, gradients)
