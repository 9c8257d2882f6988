"""Following the tensors that are alive while a model runs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.moe.metrics import routers_of

if TYPE_CHECKING:
    from torch import nn

    from litgpt_moe_ext.inspect.cost.layers import ShortModel


class LiveMemory(TorchDispatchMode):
    """Follow the storages that operators return, while it is entered.

    Attributes:
        peak: Most bytes that were alive after any operator since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[int, int] = {}
        self._references: dict[int, StorageWeakRef] = {}
        # Bytes including those that have died since `live` last looked, which takes a while.
        self._seen = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # What compiled code would do with this mode does not matter, and asking torch's compiler to keep out loads it.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = self._run(func, args, kwargs or {})
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor):
                self._see(self._storage(leaf))
        if self._seen > self.peak:
            self.peak = max(self.peak, self.live())
        return result

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _storage(self, tensor: Tensor) -> torch.UntypedStorage:
        return tensor.untyped_storage()

    def live(self) -> int:
        """Return the bytes that are alive now."""
        for key in [key for key, reference in self._references.items() if reference.expired()]:
            del self._references[key]
            self._seen -= self._bytes.pop(key)
        return self._seen

    def reset(self) -> None:
        """Start looking for a new peak."""
        self.peak = self.live()

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._references:  # an address with a reference to it is not used again
            self._references[key] = StorageWeakRef(storage)
            self._bytes[key] = storage.nbytes()
            self._seen += self._bytes[key]


class PeakOverLayers:
    """The peak of a step of a whole model, from a step of its short model.

    The step has four parts: the forward pass until it enters the last period of layers; the rest of it; the backward
    pass until it leaves that period; and the rest. A further period adds to the second part what its forward pass holds
    (autocast's copies of weights as well), to the third what it keeps for its backward pass, and to the fourth what it
    leaves behind (the tallies of its routers).

    Args:
        memory: Follows the step; is reset.
        model: The short model.
        short: Says where its periods begin.
    """

    def __init__(self, memory: LiveMemory, model: "nn.Module", short: "ShortModel") -> None:
        self._memory, self._model, self._short = memory, model, short
        memory.reset()
        self._before = memory.live()
        # Of the two marked blocks: bytes alive before their forward pass, and after their backward pass.
        self._forward: list[int] = []
        self._backward: list[int] = []
        self._peaks: list[int] = []
        if short.left_out:
            for block in short.starts(model):
                block.register_forward_pre_hook(self._enter)

    def start_backward(self) -> None:
        """Call this between forward and backward pass."""
        if self._forward:
            self._next_part()

    def peak(self) -> int:
        """Return the bytes that the step of the whole model adds at its worst moment; empties the tallies."""
        peaks = [*self._peaks, self._memory.peak]
        left = self._tallied()
        growth = [0]
        if self._forward:
            growth.append(self._forward[1] - self._forward[0])
        if self._backward:
            growth += [self._backward[0] - self._backward[1] + left, left]
        whole = [peak + self._short.left_out * grows for peak, grows in zip(peaks, growth, strict=True)]
        return max(whole) - self._before

    def _tallied(self) -> int:
        # Nothing but the optimizer, which is not called, empties tallies.
        before = self._memory.live()
        for block in self._short.sample(self._model):
            for router in routers_of(block).values():
                router.tally.take()
        left = before - self._memory.live()
        for router in routers_of(self._model).values():
            router.tally.take()
        return left

    def _enter(self, _block: "nn.Module", arguments: tuple[Tensor, ...]) -> None:
        self._forward.append(self._memory.live())
        if len(self._forward) == 2:
            self._next_part()
        if arguments[0].requires_grad:
            arguments[0].register_hook(self._leave)

    def _leave(self, _gradient: Tensor) -> None:
        self._backward.append(self._memory.live())
        if len(self._backward) == 1:
            self._next_part()

    def _next_part(self) -> None:
        self._peaks.append(self._memory.peak)
        self._memory.reset()
