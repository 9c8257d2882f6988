"""Capturing the forward and backward pass of a micro-batch, and what follows them, as CUDA graphs.

A replay runs no Python: it repeats the kernels that were launched during capture, on the same addresses.

Shape legend: B batch, T tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing.step_shares import nothing_counted
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import Replay

Loss = Callable[[Tensor, Tensor], Tensor]


class Passes(NamedTuple):
    """The forward and backward pass of a micro-batch, ready to run again.

    Attributes:
        forward: Computes the loss of the current contents of the static ids and targets.
        backward: Computes the gradients of that loss times `scale`; run it after `forward`.
        loss: Output of `forward`, a scalar.
        scale: Input of `backward`, the gradient of the loss, a scalar.
        gradients: Output of `backward`: the gradient tensor of each leaf.
    """

    forward: Callable[[], None]
    backward: Callable[[], None]
    loss: Tensor
    scale: Tensor
    gradients: dict[Tensor, Tensor]


class Capture(Protocol):
    """Makes graphs; what they share does not outlive them."""

    def passes(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        """Return the passes of `loss` over static tensors whose contents change.

        Leaves keep their gradients, and no other value has changed when this returns or raises.

        Args:
            loss: The loss function.
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.
            add: Whether the backward pass adds to the leaves' present gradients; otherwise it writes new ones.
        """

    def forward(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Replay:
        """Return the forward pass of `loss` over such tensors, without gradients and without having run it."""

    def function(self, function: Callable[[], Tensor | None]) -> Replay:
        """Return a function that draws no random numbers ready to run again, without having run it."""


class CudaCapture:
    """Captures CUDA graphs in one memory pool: finish one pair's backward before anything else of the pool runs."""

    def __init__(self) -> None:
        self._pool: Any = None

    def forward(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Replay:
        """Return the forward pass of `loss` as a graph; see `Capture`."""
        return self.function(partial(loss, ids_BT, targets_BT))

    def function(self, function: Callable[[], Tensor | None]) -> Replay:
        """Return a function as a graph; see `Capture`."""
        graph = torch.cuda.CUDAGraph()
        with _generator_set_aside(), self._capturing(graph):
            result = function()
        return Replay(graph.replay, result)

    def passes(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        """Return both passes of `loss` as graphs; see `Capture`."""
        generator = torch.cuda.default_generators[ids_BT.get_device()]
        state = generator.clone_state()
        try:
            return self._captured(loss, ids_BT, targets_BT, add)
        except Exception:
            # After an aborted capture the generator would still expect its end and refuse any other use.
            generator.graphsafe_set_state(state)
            raise

    def _captured(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._capturing(forward):
            value = loss(ids_BT, targets_BT)
        scale = torch.ones_like(value)
        leaves = leaves_of(value)
        with gradients_set_aside(leaves, keep=add):
            with self._capturing(backward):
                value.backward(scale)
            gradients = {leaf: leaf.grad for leaf in leaves if leaf.grad is not None}
        return Passes(forward.replay, backward.replay, value.detach(), scale, gradients)

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture what is launched in the scope; on failure, restore torch's state and raise the original error."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        failure: Exception | None = None
        try:
            # Other threads, such as one that pins memory for a data loader, go on calling CUDA.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    yield
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            # An aborted capture cannot be ended: torch 2.11 then stays on its stream, no longer frees cached memory of
            # the device, and keeps the memory of the graph.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):
                graph.reset()  # torch 2.15 does the rest in here, and raises at the next lines
                torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
                torch._C._cuda_releasePool(stream.device_index, self._pool)
            # The error that aborted the capture, not torch's complaint that it cannot be ended.
            raise failure or error from None
        finally:
            failure = None  # its traceback holds this frame, and the memory of the pass


class SharingCapture(NamedTuple):
    """Captures passes that share what they can, in parallel branches.

    Attributes:
        capture: Captures them.
        sharing: The scope in which they share.
        abreast: The scope in which parts of layers get branches of their own.
    """

    capture: Capture
    sharing: Callable[[], AbstractContextManager[None]]
    abreast: Callable[[], AbstractContextManager[None]]

    def passes(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        """See `Capture.passes`."""
        with self.sharing(), nothing_counted(), self.abreast():
            return self.capture.passes(loss, ids_BT, targets_BT, add)

    def forward(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Replay:
        """See `Capture.forward`. What is shared is only kept up to date for `passes`."""
        with self.abreast():
            return self.capture.forward(loss, ids_BT, targets_BT)

    def function(self, function: Callable[[], Tensor | None]) -> Replay:
        """See `Capture.function`."""
        return self.capture.function(function)


@contextlib.contextmanager
def _generator_set_aside() -> Iterator[None]:
    """Keep a capture that draws no random numbers from the state of the generator, which graphs of passes share.

    After an aborted capture, the state would still expect its end.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the leaves that receive gradients in a backward pass of `loss`."""
    leaves: list[Tensor] = []
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)  # pyrefly: ignore[missing-attribute]: which this kind of node has
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


@contextlib.contextmanager
def gradients_set_aside(leaves: Sequence[Tensor], keep: bool = False) -> Iterator[None]:
    """Restore the leaves' present gradients at the end of the scope.

    Args:
        leaves: The leaves.
        keep: Whether the leaves keep their gradients within the scope; otherwise they have none there.
    """
    kept = [leaf.grad for leaf in leaves]
    try:
        if not keep:
            for leaf in leaves:
                leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient
