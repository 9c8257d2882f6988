"""Both passes of a micro-batch as CUDA graphs.

A graph knows nothing of Python: what was launched while it was captured runs again, on the same addresses.

Shape legend: B batch, T tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


class Passes(NamedTuple):
    """Both passes of a micro-batch, ready to run again.

    Attributes:
        forward: Computes the loss of what the static ids and targets hold.
        backward: Computes the gradients of that loss times what `scale` holds, after `forward`.
        loss: Where the loss is written, a scalar.
        scale: Where the gradient of the loss is read, a scalar.
        gradients: Where each leaf gets its gradient.
    """

    forward: Callable[[], None]
    backward: Callable[[], None]
    loss: Tensor
    scale: Tensor
    gradients: dict[Tensor, Tensor]


class Capture(Protocol):
    """What makes passes."""

    def __call__(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        """Return the passes of `loss` over tensors whose contents change.

        Leaves keep the gradients that they have, and nothing has a new value when this returns, or raises.

        Args:
            loss: The loss function.
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.
            add: Whether the backward pass adds to the gradients that leaves have now; otherwise it writes new ones.
        """


class CudaCapture:
    """Captures passes as CUDA graphs that share their memory: only one pair may be between its passes at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        """Return both passes of `loss` as graphs; see `Capture`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[ids_BT.get_device()]
        state = generator.clone_state()
        try:
            return self._captured(loss, ids_BT, targets_BT, add)
        except Exception:
            # Where a capture ended early, the generator would wait for its end for ever, and refuse all else.
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
        """Capture what is launched in the scope; where that fails, leave torch as it was, and say why it did."""
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
            # A capture that was broken off cannot be ended: torch 2.11 then stays on its stream, frees no cached memory
            # of the device any more, and keeps the memory of the graph.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):
                graph.reset()  # which does the rest in torch 2.15, where what follows is an error
                torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
                torch._C._cuda_releasePool(stream.device_index, self._pool)
            # The error that broke it off, not the one that it cannot be ended.
            raise failure or error from None
        finally:
            failure = None  # its traceback holds this frame, and the memory of the pass


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the leaves that a backward pass of `loss` gives gradients to."""
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
    """Give leaves their present gradients back at the end of the scope.

    Args:
        leaves: The leaves.
        keep: Whether they have them in the scope as well; otherwise they have none.
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
