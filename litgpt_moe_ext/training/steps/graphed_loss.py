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

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels.side_stream import side_by_side
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights
from litgpt_moe_ext.moe.step_shares import add_up, nothing_counted
from litgpt_moe_ext.training.steps.capture import Capture, CudaCapture, Loss, Passes, gradients_set_aside
from litgpt_moe_ext.training.steps.captured_passes import CapturedPasses, Inputs
from litgpt_moe_ext.training.steps.graph_check import Reference, ReplayError, side_effects_undone
from litgpt_moe_ext.training.steps.graph_obstacles import hook_of_others, lack_of_memory, noting_waits
from litgpt_moe_ext.training.steps.room import NoRoom, Room

_Result = TypeVar("_Result")


class GraphedLoss:
    """A loss function whose passes are captured in the third optimizer step and replayed from then on.

    The first two run as they are: kernels are compiled, which a capture does not allow, and the optimizer makes its
    states. In the second, a wait for the device is noticed, which no graph can hold. A step begins where no leaf has a
    gradient.

    Batches of another shape than the captured run as they are. So do micro-batches that need more room than was
    captured (`litgpt_moe_ext.training.steps.room`), until the next step captures anew. Where capturing fails, or a
    replay has other numbers (`litgpt_moe_ext.training.steps.graph_check`), gradients and random numbers are those of
    before, and the micro-batch runs as it is.

    Args:
        loss: Takes ids and targets, both int64, (B, T), and returns a scalar.
        model: Whose parameters and buffers it reads.
        careful: Whether to go on without graphs where they fail, or where their memory and that of the same passes
            without them, such as those of a validation, do not fit side by side.
        say: Told once whether graphs are used.
        exchange: Called when gradients have been written that autograd knows nothing of.
        make_capture: Returns what makes the passes.

    Attributes:
        sharing: Returns the scope in which the passes of a step share casts of weights and sums of their gradients.
        abreast: Returns the scope in which parts of layers are captured side by side.
        room: What passes must have room for.
    """

    def __init__(
        self,
        loss: Loss,
        model: nn.Module,
        careful: bool,
        say: Callable[[str], None],
        exchange: Callable[[], None] = lambda: None,
        make_capture: Callable[[], Capture] = CudaCapture,
    ) -> None:
        self._loss, self._model, self._careful, self._say = loss, model, careful, say
        self._exchange, self._make_capture = exchange, make_capture
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._steps = 0
        self._turn = 0
        self._used = True
        self._captured: CapturedPasses | None = None
        self._accumulates = False
        self._warm: dict[torch.Size, tuple[int, ...]] = {}  # shapes that have run, and the room that they needed
        self._weights = StepWeights()
        self.sharing: Callable[[], AbstractContextManager[None]] = self._weights.shared
        self.abreast: Callable[[], AbstractContextManager[None]] = side_by_side
        self.room: Room = NoRoom()
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss, a scalar whose backward pass adds to the gradients of the leaves.

        Args:
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.

        Raises:
            SettingsError: If graphs fail and it is not `careful`.
        """
        if not self._used:
            return self._loss(ids_BT, targets_BT)
        begins = all(parameter.grad is None for parameter in self._parameters)
        self._steps += begins
        self._accumulates |= not begins
        if begins:
            self._weights.expire()
        add_up()  # as a callback may have called the model; no graph would know
        is_warm, sizes = ids_BT.shape in self._warm, self._noted(ids_BT)
        if self._steps == 2:
            return self._watched(ids_BT, targets_BT)
        if self._steps > 2 and begins and is_warm and self._lacks_passes(ids_BT.shape, sizes):
            self._captured = self._new_capture(ids_BT, targets_BT, sizes)
        if self._captured is None or not self._captured.fits(ids_BT, targets_BT, sizes):
            return self._eager(ids_BT, targets_BT)
        self._weights.refresh()
        passes = self._tried(partial(self._captured.passes, begins))
        captured = self._captured
        if passes is None or captured is None:
            return self._eager(ids_BT, targets_BT)
        captured.ids_BT.copy_(ids_BT)
        captured.targets_BT.copy_(targets_BT)
        passes.forward()

        def backward(grad: Tensor) -> None:
            passes.scale.copy_(grad)
            passes.backward()
            captured.hand_over(passes)
            self._exchange()

        return self._result(passes.loss, backward)

    def _noted(self, ids_BT: Tensor) -> tuple[int, ...]:
        """Return the room that batches of this shape have needed so far."""
        needed = self.room.needed(ids_BT)
        self._warm[ids_BT.shape] = sizes = tuple(map(max, needed, self._warm.get(ids_BT.shape, needed)))
        return sizes

    def _lacks_passes(self, shape: torch.Size, sizes: tuple[int, ...]) -> bool:
        captured = self._captured
        return captured is None or captured.is_stale() or captured.is_outgrown(shape, sizes)

    def _eager(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if not self._used:
            return self._loss(ids_BT, targets_BT)
        # It may be the first of a step that does not look like one, because a leaf has kept its gradient.
        self._weights.expire()
        loss = self._loss(ids_BT, targets_BT)
        return self._result(loss.detach(), loss.backward)

    def _result(self, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        # The caller keeps its last loss. If the autograd graph of an eager pass lived on with it, its nodes that add up
        # gradients would run on the stream of that pass, where nothing may happen during a capture.
        self._turn = turn = self._turn + 1

        def once(grad: Tensor) -> None:
            if turn != self._turn:
                raise RuntimeError("the backward pass of a loss must run before the next loss is computed")
            backward(grad)

        return _Backward.apply(self._anchor, loss, once)

    def _watched(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        waits: list[str] = []
        with noting_waits(waits):
            loss = self._loss(ids_BT, targets_BT)

        def backward(grad: Tensor) -> None:
            with noting_waits(waits):
                loss.backward(grad)
            if waits:
                self._stop(f"the model waits for the device, at {waits[0]}")

        return self._result(loss.detach(), backward)

    def _new_capture(self, ids_BT: Tensor, targets_BT: Tensor, sizes: tuple[int, ...]) -> CapturedPasses | None:
        is_first = self._captured is None
        is_outgrown = self._captured is not None and self._captured.is_outgrown(ids_BT.shape, sizes)
        self._captured = reference = lack = None
        inputs = Inputs(ids_BT.clone(), targets_BT.clone(), sizes)
        self.room.reserve(inputs.ids_BT, sizes)
        if is_first:
            obstacle = hook_of_others(self._model) or lack_of_memory(ids_BT.device)
            if self._careful and obstacle is not None:
                self._stop(f"{obstacle}; --cuda_graphs true tries them anyway")
                return None
        if is_first or is_outgrown:
            self._weights.refresh()
            reference = self._tried(partial(self._rehearse, (ids_BT, targets_BT), inputs))
            if reference is None:
                return None
        if is_first:
            # Graphs are worth more than casts that are kept.
            lack = lack_of_memory(ids_BT.device, self._weights.size) if self._weights.size else None
        captured = CapturedPasses(self._capture(), self._loss, self._model, inputs)

        def first_passes() -> Passes:
            if reference is None:
                return captured.passes(begins=True)
            if is_first and lack is None:
                self._weights.keep()
                self._weights.refresh()
            return captured.check(reference, self._accumulates, self._model)

        if self._tried(first_passes) is None:
            return None
        if is_first:
            casts = "" if lack is None else f"; casts of the experts' weights are not kept: {lack}"
            self._say(f"CUDA graphs: on, from this step{casts}")
        return captured

    def _rehearse(self, batch: tuple[Tensor, Tensor], inputs: Inputs) -> Reference:
        # What is shared, and the room, are tried on gradients that nobody uses, before they are captured: a capture
        # allows no kernel to be compiled, and no step should be the first to meet one that fails.
        reference = Reference(self._loss, *batch)
        ids_BT, targets_BT, _ = inputs
        with side_effects_undone(ids_BT.device), gradients_set_aside(reference.leaves), self.sharing():
            self._loss(ids_BT, targets_BT).backward()
            if self._accumulates or self._careful:  # otherwise there may be no room for gradients beside a forward pass
                self._loss(ids_BT, targets_BT).backward()
        return reference

    def _tried(self, attempt: Callable[[], _Result]) -> _Result | None:
        # None where it fails. The caller goes on when the error is gone, whose traceback holds the memory of a pass.
        try:
            return attempt()
        except Exception as error:
            self._give_up(error)
            return None

    def _capture(self) -> Capture:
        # Graphs should go when the run does, not when a cycle is found: so nothing here knows this object.
        capture, sharing, abreast = self._make_capture(), self.sharing, self.abreast

        def sharing_capture(loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
            with sharing(), nothing_counted(), abreast():
                return capture(loss, ids_BT, targets_BT, add)

        return sharing_capture

    def _give_up(self, error: Exception) -> None:
        text = (str(error).splitlines() or [""])[0]
        if not isinstance(error, ReplayError):
            kind = "" if text and isinstance(error, RuntimeError) else type(error).__name__
            text = f"capturing failed: {': '.join(filter(None, (kind, text)))}"
        self._stop(text, error)

    def _stop(self, reason: str, error: Exception | None = None) -> None:
        self._used, self._captured = False, None
        self._weights.clear()
        if not self._careful:
            raise SettingsError(f"cuda_graphs: true cannot work here ({reason}); set cuda_graphs: auto") from error
        self._say(f"CUDA graphs: off ({reason})")


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
