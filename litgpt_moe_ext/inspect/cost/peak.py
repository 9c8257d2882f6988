"""The peak memory of a step of a model, from a step of a model with fewer layers."""

from typing import TYPE_CHECKING

from torch import Tensor

from litgpt_moe_ext.moe.balancing.metrics import routers_of

if TYPE_CHECKING:
    from torch import nn

    from litgpt_moe_ext.inspect.cost.layers import ShortModel
    from litgpt_moe_ext.inspect.cost.weightless import WeightlessMemory


class PeakOverLayers:
    """The peak memory of a step of a whole model, from a step of its short model.

    The step has four parts: the forward pass up to the last period of layers; the rest of it; the backward pass through
    that period; and the rest. A further period adds to the second part what its forward pass holds (including
    autocast's copies of weights), to the third what it keeps for its backward pass, and to the fourth what it leaves
    behind (the tallies of its routers).

    Args:
        memory: Tracks the step; it is reset.
        model: The short model.
        short: Tells where its periods begin.
    """

    def __init__(self, memory: "WeightlessMemory", model: "nn.Module", short: "ShortModel") -> None:
        self._memory, self._model, self._short = memory, model, short
        memory.reset()
        self._before = memory.live
        # Bytes alive before the forward pass of the two marked blocks, and after their backward pass.
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
        """Return the bytes that the step of the whole model adds at its peak; empties the tallies."""
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
        # Only the optimizer would empty the tallies, but it is not called.
        before = self._memory.live
        for block in self._short.sample(self._model):
            for router in routers_of(block).values():
                router.tally.take()
        left = before - self._memory.live
        for router in routers_of(self._model).values():
            router.tally.take()
        return left

    def _enter(self, _block: "nn.Module", arguments: tuple[Tensor, ...]) -> None:
        self._forward.append(self._memory.live)
        if len(self._forward) == 2:
            self._next_part()
        if arguments[0].requires_grad:
            arguments[0].register_hook(self._leave)

    def _leave(self, _gradient: Tensor) -> None:
        self._backward.append(self._memory.live)
        if len(self._backward) == 1:
            self._next_part()

    def _next_part(self) -> None:
        self._peaks.append(self._memory.peak)
        self._memory.reset()
