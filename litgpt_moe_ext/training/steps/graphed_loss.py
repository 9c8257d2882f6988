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
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels.side_stream import side_by_side
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights
from litgpt_moe_ext.moe.step_shares import add_up, nothing_counted
from litgpt_moe_ext.training.steps.capture import Capture, CudaCapture, Loss, Passes, gradients_set_aside
from litgpt_moe_ext.training.steps.captured_passes import CapturedPasses, Inputs
from litgpt_moe_ext.training.steps.detached_loss import DetachedLosses
from litgpt_moe_ext.training.steps.graph_check import Reference, side_effects_undone
from litgpt_moe_ext.training.steps.graph_obstacles import (
    GraphError,
    hook_of_others,
    lack_of_memory,
    noting_waits,
    reason_of,
)
from litgpt_moe_ext.training.steps.pass_history import PassHistory, Turn
from litgpt_moe_ext.training.steps.room import NoRoom, Room

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class GraphOptions:
    """How passes become graphs.

    Attributes:
        careful: Whether to go on without graphs where they fail, or where their memory and that of the same passes
            without them, such as those of a validation, do not fit side by side.
        room: What passes must have room for.
        exchange: Called when gradients have been written that autograd knows nothing of.
        make_capture: Returns what makes the passes.
        sharing: Whether the passes of a step share casts of weights and sums of their gradients.
        abreast: Whether parts of layers are captured side by side.
    """

    careful: bool
    room: Room = field(default_factory=NoRoom)
    exchange: Callable[[], None] = lambda: None
    make_capture: Callable[[], Capture] = CudaCapture
    sharing: bool = True
    abreast: bool = True


class GraphedLoss:
    """A loss function whose passes are captured in the third optimizer step and replayed from then on.

    The first two run as they are (`litgpt_moe_ext.training.steps.pass_history` says why). A step begins where no leaf
    has a gradient.

    Batches of another shape than the captured run as they are. So do micro-batches that need more room than was
    captured (`litgpt_moe_ext.training.steps.room`), until the next step captures anew. Where capturing fails, or a
    replay has other numbers (`litgpt_moe_ext.training.steps.graph_check`), gradients and random numbers are those of
    before, and the micro-batch runs as it is, as do all that follow.

    Args:
        loss: Takes ids and targets, both int64, (B, T), and returns a scalar.
        model: Whose parameters and buffers it reads.
        say: Told once whether graphs are used.
        options: How passes become graphs.
    """

    def __init__(self, loss: Loss, model: nn.Module, say: Callable[[str], None], options: GraphOptions) -> None:
        self._loss, self._model, self._say, self._options = loss, model, say, options
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._history = PassHistory(options.room)
        self._weights = StepWeights()
        self._detached = DetachedLosses()
        self._captured: CapturedPasses | None = None
        self._is_off = False

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss, a scalar whose backward pass adds to the gradients of the leaves.

        Args:
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.

        Raises:
            SettingsError: If graphs fail and the options are not careful.
        """
        if self._is_off:
            return self._loss(ids_BT, targets_BT)
        begins = all(parameter.grad is None for parameter in self._parameters)
        if begins:
            self._weights.expire()
        add_up()  # as a callback may have called the model; no graph would know
        turn = self._history.note(ids_BT, targets_BT, begins)
        if turn.watched:
            return self._watched(ids_BT, targets_BT)
        ready = self._tried(partial(self._ready, turn))
        if ready is None:
            return self._eager(ids_BT, targets_BT)
        return self._replayed(*ready, turn.inputs)

    def _ready(self, turn: Turn) -> tuple[CapturedPasses, Passes] | None:
        """Return the passes for a micro-batch, captured now if it is time for that; None if none fit it."""
        if turn.captures and self._lacks_passes(turn.inputs):
            self._captured = self._new_capture(turn.inputs)
        captured = self._captured
        if captured is None or not captured.fits(turn.inputs):
            return None
        self._weights.refresh()
        return captured, captured.passes(turn.begins)

    def _lacks_passes(self, batch: Inputs) -> bool:
        captured = self._captured
        return captured is None or captured.has_moved() or captured.is_outgrown(batch)

    def _replayed(self, captured: CapturedPasses, passes: Passes, batch: Inputs) -> Tensor:
        captured.load(batch)
        passes.forward()

        def backward(grad: Tensor) -> None:
            passes.scale.copy_(grad)
            passes.backward()
            captured.hand_over(passes)
            self._options.exchange()

        return self._detached(passes.loss, backward)

    def _eager(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if self._is_off:
            return self._loss(ids_BT, targets_BT)
        # It may be the first of a step that does not look like one, because a leaf has kept its gradient.
        self._weights.expire()
        loss = self._loss(ids_BT, targets_BT)
        return self._detached(loss.detach(), loss.backward)

    def _watched(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        waits: list[str] = []
        with noting_waits(waits):
            loss = self._loss(ids_BT, targets_BT)

        def backward(grad: Tensor) -> None:
            with noting_waits(waits):
                loss.backward(grad)
            if waits:
                self._stop(GraphError(f"the model waits for the device, at {waits[0]}"))

        return self._detached(loss.detach(), backward)

    def _new_capture(self, batch: Inputs) -> CapturedPasses:
        is_first = self._captured is None
        is_outgrown = self._captured is not None and self._captured.is_outgrown(batch)
        self._captured = None  # and its memory is free
        if is_first and self._options.careful:
            self._require_chances(batch.ids_BT.device)
        inputs, reference, casts = batch.cloned(), None, ""
        self._options.room.reserve(inputs.ids_BT, inputs.sizes)
        if is_first or is_outgrown:
            self._weights.refresh()
            reference = self._rehearsed(batch, inputs)
        if is_first:
            casts = self._keep_casts(inputs.ids_BT.device)
        captured = CapturedPasses(self._capture(), self._loss, self._model, inputs)
        if reference is None:
            captured.passes(begins=True)
        else:
            captured.check(reference, self._history.accumulates, self._model)
        if is_first:
            self._say(f"CUDA graphs: on, from this step{casts}")
        return captured

    def _require_chances(self, device: torch.device) -> None:
        obstacle = hook_of_others(self._model) or lack_of_memory(device)
        if obstacle is not None:
            raise GraphError(f"{obstacle}; --cuda_graphs true tries them anyway")

    def _rehearsed(self, batch: Inputs, inputs: Inputs) -> Reference:
        # What is shared, and the room, are tried on gradients that nobody uses, before they are captured: a capture
        # allows no kernel to be compiled, and no step should be the first to meet one that fails.
        reference = Reference(self._loss, batch.ids_BT, batch.targets_BT)
        with side_effects_undone(batch.ids_BT.device), gradients_set_aside(reference.leaves), self._sharing():
            self._loss(inputs.ids_BT, inputs.targets_BT).backward()
            # Otherwise there may be no room for gradients beside a forward pass.
            if self._history.accumulates or self._options.careful:
                self._loss(inputs.ids_BT, inputs.targets_BT).backward()
        return reference

    def _keep_casts(self, device: torch.device) -> str:
        """Keep the casts of weights, for which graphs are not given up; say why not where memory is short."""
        lack = lack_of_memory(device, self._weights.size) if self._weights.size else None
        if lack is not None:
            return f"; casts of the experts' weights are not kept: {lack}"
        self._weights.keep()
        self._weights.refresh()
        return ""

    @property
    def _sharing(self) -> Callable[[], AbstractContextManager[None]]:
        return self._weights.shared if self._options.sharing else contextlib.nullcontext

    def _capture(self) -> Capture:
        # Graphs should go when the run does, not when a cycle is found: so nothing here knows this object.
        capture, sharing = self._options.make_capture(), self._sharing
        abreast = side_by_side if self._options.abreast else contextlib.nullcontext

        def sharing_capture(loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
            with sharing(), nothing_counted(), abreast():
                return capture(loss, ids_BT, targets_BT, add)

        return sharing_capture

    def _tried(self, attempt: Callable[[], _Result]) -> _Result | None:
        # None where it fails. The caller goes on when the error is gone, whose traceback holds the memory of a pass.
        try:
            return attempt()
        except Exception as error:
            self._stop(error)
            return None

    def _stop(self, error: Exception) -> None:
        self._is_off, self._captured = True, None
        self._weights.clear()
        reason = reason_of(error)
        if not self._options.careful:
            raise SettingsError(f"cuda_graphs: true cannot work here ({reason}); set cuda_graphs: auto") from error
        self._say(f"CUDA graphs: off ({reason})")
