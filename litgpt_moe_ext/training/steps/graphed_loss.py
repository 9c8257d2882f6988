"""Forward and backward pass of a micro-batch as CUDA graphs.

A small model's kernels end before the host has launched the next. A CUDA graph launches all of them at once: what was
launched while it was captured runs again, on the same addresses. That needs a model that never waits for the device
and does the same for every batch, as the layers of this package do.

A graph knows nothing of Python. What a pass reads must stay where it was, and gradients are written where they were
written first; both are looked after here. Parameters get their gradients as in an eager backward pass, also those of
leaves that are no parameters, such as the tallies of routers.

Passes of a step share what they can of the experts' weights (`litgpt_moe_ext.moe.kernels.step_weights`).

Shape legend: B batch, T tokens.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from litgpt_moe_ext.moe.kernels.step_weights import StepWeights

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

    def __call__(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Passes:
        """Return the passes of `loss` over tensors whose contents change.

        The backward pass adds to the gradients that leaves have now, and writes those of leaves that have none. Leaves
        keep the gradients that they have, and nothing has a new value when this returns.

        Args:
            loss: The loss function.
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.
        """


class CudaCapture:
    """Captures passes as CUDA graphs that share their memory: only one pair may be between its passes at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Passes:
        """Return both passes of `loss` as graphs; see `Capture`."""
        generator = torch.cuda.default_generators[ids_BT.get_device()]
        state = generator.clone_state()
        try:
            return self._captured(loss, ids_BT, targets_BT)
        except RuntimeError:
            # Where a capture ended early, the generator would wait for its end for ever, and refuse all else.
            generator.graphsafe_set_state(state)
            raise

    def _captured(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Passes:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as one that pins memory for a data loader, go on calling CUDA.
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            value = loss(ids_BT, targets_BT)
        self._pool = self._pool or forward.pool()
        scale = torch.ones_like(value)
        kept = {leaf: leaf.grad for leaf in leaves_of(value)}
        try:
            with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
                value.backward(scale)
            gradients = {leaf: leaf.grad for leaf in kept if leaf.grad is not None}
        finally:
            for leaf, gradient in kept.items():
                leaf.grad = gradient
        return Passes(forward.replay, backward.replay, value.detach(), scale, gradients)


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


class GraphedLoss:
    """A loss function whose passes are captured in the third optimizer step and replayed from then on.

    The first two run as they are: kernels are compiled, and the optimizer makes its states. In the second, a wait for
    the device is noticed, which no graph can hold, and which of the experts' weights are cast. A step begins where no
    leaf has a gradient.

    Batches of another shape than the captured run as they are.

    Args:
        loss: Takes ids and targets, both int64, (B, T), and returns a scalar.
        model: Whose parameters and buffers it reads.
        careful: Whether graphs are used only where their memory and that of the same passes without them, such as
            those of a validation, fit side by side.
        say: Told once whether graphs are used.
        make_capture: Returns what makes the passes.
        share: Whether passes share casts of weights and sums of their gradients.
    """

    def __init__(
        self,
        loss: Loss,
        model: nn.Module,
        careful: bool,
        say: Callable[[str], None],
        make_capture: Callable[[], Capture] = CudaCapture,
        share: bool = True,
    ) -> None:
        self._loss, self._model, self._careful, self._say = loss, model, careful, say
        self._make_capture = make_capture
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._steps = 0
        self._turn = 0
        self._used = True
        self._captured: _Captured | None = None
        self._weights = StepWeights()
        self._sharing = self._weights.shared if share else contextlib.nullcontext
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss, a scalar whose backward pass adds to the gradients of the leaves.

        Args:
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.
        """
        if not self._used:
            return self._loss(ids_BT, targets_BT)
        begins = all(parameter.grad is None for parameter in self._parameters)
        self._steps += begins
        if begins:
            self._weights.expire()
        if self._steps == 2 and begins:
            return self._watched(ids_BT, targets_BT)
        if self._steps > 2 and begins and (self._captured is None or self._captured.is_stale()):
            self._captured = self._first_capture(ids_BT, targets_BT)
        captured = self._captured
        if captured is None or not captured.fits(ids_BT, targets_BT):
            return self._eager(ids_BT, targets_BT)
        self._weights.refresh()
        try:
            passes = captured.passes(begins)
        except RuntimeError as error:
            self._give_up(error)
            return self._eager(ids_BT, targets_BT)
        captured.ids_BT.copy_(ids_BT)
        captured.targets_BT.copy_(targets_BT)
        passes.forward()

        def backward(grad: Tensor) -> None:
            passes.scale.copy_(grad)
            passes.backward()
            captured.hand_over(passes)

        return self._result(passes.loss, backward)

    def _eager(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if not self._used:
            return self._loss(ids_BT, targets_BT)
        loss = self._loss(ids_BT, targets_BT)
        return self._result(loss.detach(), loss.backward)

    def _result(self, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        # The caller keeps its last loss. Were what autograd noted for an eager pass to live on with it, the nodes that
        # add up gradients would do so on the stream of that pass, where nothing may happen during a capture.
        self._turn = turn = self._turn + 1

        def once(grad: Tensor) -> None:
            if turn != self._turn:
                raise RuntimeError("the backward pass of a loss must run before the next loss is computed")
            backward(grad)

        return _Backward.apply(self._anchor, loss, once)

    def _watched(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        waits: list[str] = []
        with self._sharing(), _noting_waits(waits):
            loss = self._loss(ids_BT, targets_BT)

        def backward(grad: Tensor) -> None:
            with self._sharing(), _noting_waits(waits):
                loss.backward(grad)
            if waits:
                self._stop(f"the model waits for the device, at {waits[0]}")

        return self._result(loss.detach(), backward)

    def _first_capture(self, ids_BT: Tensor, targets_BT: Tensor) -> "_Captured | None":
        is_first, self._captured = self._captured is None, None
        keeps = is_first
        if is_first and self._careful and _lack_of_memory(ids_BT.device, self._weights.size) is not None:
            # Graphs are worth more than casts that are kept.
            keeps, lack = False, _lack_of_memory(ids_BT.device)
            if lack is not None:
                self._stop(lack)
                return None
        captured = _Captured(self._capture(), self._loss, self._model, (ids_BT.clone(), targets_BT.clone()))
        try:
            if keeps:
                self._weights.keep()
            captured.passes(begins=True)
        except RuntimeError as error:
            self._give_up(error)
            return None
        if is_first:
            self._say("CUDA graphs: on, from this step")
        return captured

    def _capture(self) -> Capture:
        capture = self._make_capture()

        def sharing_capture(loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Passes:
            with self._sharing():
                return capture(loss, ids_BT, targets_BT)

        return sharing_capture

    def _give_up(self, error: Exception) -> None:
        self._captured = None
        self._stop(f"capturing failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    def _stop(self, reason: str) -> None:
        self._used = False
        self._weights.clear()
        self._say(f"CUDA graphs: off ({reason})")


class _Captured:
    """The passes for the first micro-batch of a step and for the others, and the tensors that they know."""

    def __init__(self, capture: Capture, loss: Loss, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        self._capture, self._loss = capture, loss
        self.ids_BT, self.targets_BT = inputs
        self._first: Passes | None = None
        self._other: Passes | None = None
        # To hold them keeps their memory from being used for anything else.
        self._read = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def fits(self, ids_BT: Tensor, targets_BT: Tensor) -> bool:
        return ids_BT.shape == self.ids_BT.shape and targets_BT.shape == self.targets_BT.shape

    def is_stale(self) -> bool:
        """Return whether a parameter or a buffer is no longer where it was."""
        return any(
            tensors.get(name) is not tensor or tensor.data_ptr() != address
            for tensors, name, tensor, address in self._read
        )

    def passes(self, begins: bool) -> Passes:
        """Return the passes for the next micro-batch, and have gradients lie where they add to them.

        Args:
            begins: Whether no leaf has a gradient yet.
        """
        if self._first is None:
            self._first = self._capture(self._loss, self.ids_BT, self.targets_BT)
        if begins and all(leaf.grad is None for leaf in self._first.gradients):
            return self._first
        for leaf, gradient in self._first.gradients.items():
            if leaf.grad is None:
                gradient.zero_()
            elif leaf.grad is not gradient:
                gradient.copy_(leaf.grad)
            leaf.grad = gradient
        if self._other is None:
            self._other = self._capture(self._loss, self.ids_BT, self.targets_BT)
        return self._other

    def hand_over(self, passes: Passes) -> None:
        """Give the leaves the gradients that were just computed."""
        if passes is self._first:
            for leaf, gradient in passes.gradients.items():
                leaf.grad = gradient


class _Backward(torch.autograd.Function):
    """A loss that was computed elsewhere, and its backward pass."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.run = backward
        # The next micro-batch writes its loss where this one did.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        run, ctx.run = ctx.run, _raise_second
        run(grads[0])
        return None, None, None


def _raise_second(_grad: Tensor) -> None:
    raise RuntimeError("the backward pass of a loss can run once only")


@contextlib.contextmanager
def _noting_waits(places: list[str]) -> Iterator[None]:
    """Note where the host waits for the device in a scope, as `file:line`."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    for warning in noted:
        if "called a synchronizing" in str(warning.message):
            places.append(f"{warning.filename}:{warning.lineno}")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _lack_of_memory(device: torch.device, more: int = 0) -> str | None:
    """Return how much memory is missing, as words, where graphs and passes without them do not fit side by side.

    Args:
        device: Where.
        more: Bytes that graphs need beside the memory of the passes.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    passes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    needed = torch.cuda.max_memory_allocated(device) + passes + more
    if needed <= room:
        return None
    return (
        f"they would need {needed / 2**30:.1f} GiB, {room / 2**30:.1f} are there; --cuda_graphs true tries them anyway"
    )
