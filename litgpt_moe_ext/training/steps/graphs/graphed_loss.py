"""The forward and backward pass of a micro-batch, and what happens to the gradients of a step, as CUDA graphs.

In a small model, kernels finish before the host has launched the next one. A CUDA graph launches all of them at once:
it repeats the kernels launched during capture, on the same addresses. The model must never wait for the device and must
do the same for every batch, as the layers of this package do.

A replay runs no Python. Tensors that a pass reads must not move, and gradients are written to the addresses of the
capture; this module takes care of both. Leaves get their gradients as in an eager backward pass, including leaves that
are not parameters, such as the tallies of routers.

Passes of a step share what they can of the experts' weights (`litgpt_moe_ext.moe.kernels.step_weights`).

Shape legend: B batch, T tokens.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels.side_stream import side_by_side
from litgpt_moe_ext.moe.balancing.step_shares import add_up
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights
from litgpt_moe_ext.training.steps.graphs.capture import (
    Capture,
    CudaCapture,
    Loss,
    Passes,
    SharingCapture,
    gradients_set_aside,
)
from litgpt_moe_ext.training.steps.graphs.check import Reference, side_effects_undone
from litgpt_moe_ext.training.steps.graphs.detached_loss import DetachedLosses
from litgpt_moe_ext.training.steps.graphs.dynamic_sizes import DynamicSizes, SizesByShape
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, TaskGraphs
from litgpt_moe_ext.training.steps.graphs.inputs import Inputs
from litgpt_moe_ext.training.steps.graphs.obstacles import (
    GraphError,
    hook_of_others,
    lack_of_memory,
    noting_waits,
    reason_of,
)
from litgpt_moe_ext.training.steps.graphs.passes import CapturedPasses
from litgpt_moe_ext.training.steps.graphs.validation import CapturedValidation

_Result = TypeVar("_Result")

# The first step compiles kernels, which a capture does not allow, and the optimizer creates its states. The second is
# watched for waits for the device, which a graph cannot contain.
_WATCHED = 2


@dataclass(frozen=True)
class GraphOptions:
    """How passes become graphs.

    Attributes:
        careful: Whether to continue without graphs if they fail, or if their memory and that of passes without graphs,
            such as a validation's, do not fit side by side.
        dynamic_sizes: Sizes that depend on the values of a batch, if any.
        exchange: Called after a replay has written gradients, which autograd does not see.
        make_capture: Returns what captures passes.
        sharing: Whether the passes of a step share casts of weights and sums of their gradients.
        abreast: Whether parts of layers are captured on parallel streams.
    """

    careful: bool
    dynamic_sizes: DynamicSizes | None = None
    exchange: Callable[[], None] = lambda: None
    make_capture: Callable[[], Capture] = CudaCapture
    sharing: bool = True
    abreast: bool = True


class Graphs(NamedTuple):
    """The graphs of a run. They share memory, so one must have ended before another runs.

    Attributes:
        passes: Those of micro-batches.
        tasks: What happens to the gradients of the passes.
        validation: The loss without gradients.
    """

    passes: CapturedPasses
    tasks: TaskGraphs
    validation: CapturedValidation


class GraphedLoss:
    """A loss function whose passes are captured in the third optimizer step and replayed from then on.

    The first two steps run eagerly. A step begins when no parameter has a gradient.

    Batches of another shape than the captured one run eagerly. So do micro-batches that need larger sizes than were
    captured (`litgpt_moe_ext.training.steps.graphs.dynamic_sizes`), until the next step captures anew. If capturing
    fails, or a replay computes something else (`litgpt_moe_ext.training.steps.graphs.check`), gradients and random
    generators are restored, and this micro-batch and all later ones run eagerly.

    Args:
        loss: Takes ids and targets, both int64, (B, T), and returns a scalar.
        model: The model whose parameters and buffers `loss` reads.
        say: Told once whether graphs are used.
        options: How passes become graphs.
    """

    def __init__(self, loss: Loss, model: nn.Module, say: Callable[[str], None], options: GraphOptions) -> None:
        self._loss, self._model, self._say, self._options = loss, model, say, options
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sizes = SizesByShape(options.dynamic_sizes)
        self._steps = 0
        self._accumulates = False  # whether a step has had more than one micro-batch
        self._weights = StepWeights()
        self._detached = DetachedLosses()
        self._graphs: Graphs | None = None
        self._is_off = False
        self._left_out: set[str] = set()  # what could not be captured besides passes

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
        add_up()  # a callback may have called the model, which a graph would miss
        self._steps += begins
        self._accumulates |= not begins
        may_capture = begins and self._steps > _WATCHED and ids_BT.shape in self._sizes
        batch = Inputs(ids_BT, targets_BT, self._sizes.note(ids_BT))
        if self._steps == _WATCHED:
            return self._watched(ids_BT, targets_BT)
        ready = self._tried(partial(self._ready, batch, begins, may_capture))
        if ready is None:
            return self._eager(ids_BT, targets_BT)
        return self._replayed(*ready, batch)

    def run_task(self, task: GradientTask) -> Tensor | None:
        """Do work on the gradients of the step, as a graph if they are where captured passes write them.

        Args:
            task: The work. If it cannot be captured, it runs without a graph from then on; passes stay graphs.

        Returns:
            What the task returns.
        """
        graphs = self._graphs
        if graphs is None or not graphs.passes.have_written(self._parameters):
            return task.run()
        replay = self._besides(task.name, partial(graphs.tasks.of, task))
        if replay is None:
            return task.run()
        replay.run()
        # A copy, because the next replay writes to the same address.
        return None if replay.result is None else replay.result.clone()

    def validated(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss of a model in evaluation mode without gradients, as a graph if there are graphs of passes.

        Args:
            ids_BT: Token ids, int64.
            targets_BT: Targets, int64.
        """
        loss = None
        if self._graphs is not None:
            loss = self._besides("validation", partial(self._graphs.validation, ids_BT, targets_BT))
        return self._loss(ids_BT, targets_BT) if loss is None else loss

    def _besides(self, name: str, attempt: Callable[[], _Result | None]) -> _Result | None:
        """Return what an attempt returns; None if it fails, now or earlier, which leaves the passes as they are."""
        if name in self._left_out:
            return None
        # As in `_tried`, nothing of the error may outlive this method.
        try:
            return attempt()
        except Exception as error:
            self._left_out.add(name)
            self._say(f"CUDA graphs: not for {name} ({reason_of(error)})")
            return None

    def _ready(self, batch: Inputs, begins: bool, may_capture: bool) -> tuple[CapturedPasses, Passes] | None:
        """Return the passes for a micro-batch, captured now if they may be and none serve it; None if no passes fit."""
        if may_capture and (self._graphs is None or self._graphs.passes.lacks(batch)):
            self._graphs = self._new_graphs(batch)
        if self._graphs is None or not self._graphs.passes.inputs.fits(batch):
            return None
        self._weights.refresh()
        captured = self._graphs.passes
        return captured, captured.passes(begins)

    def _replayed(self, captured: CapturedPasses, passes: Passes, batch: Inputs) -> Tensor:
        captured.inputs.load(batch)
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
        # This may be the first micro-batch of a step unnoticed, because a parameter has kept its gradient.
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

    def _new_graphs(self, batch: Inputs) -> Graphs:
        is_first = self._graphs is None
        is_outgrown = self._graphs is not None and self._graphs.passes.inputs.is_outgrown(batch)
        self._graphs = None  # frees their memory
        if is_first and self._options.careful:
            self._require_chances(batch.ids_BT.device)
        inputs, reference, casts = batch.cloned(), None, ""
        self._sizes.reserve(inputs.ids_BT, inputs.sizes)
        if is_first or is_outgrown:
            self._weights.refresh()
            reference = self._rehearsed(batch, inputs)
        if is_first:
            casts = self._keep_casts(inputs.ids_BT.device)
        capture = self._capture()
        graphs = Graphs(
            CapturedPasses(capture, self._loss, self._model, inputs),
            TaskGraphs(capture.function),
            CapturedValidation(capture, self._loss, self._model, self._options.dynamic_sizes),
        )
        if reference is None:
            graphs.passes.passes(begins=True)
        else:
            graphs.passes.check(reference, self._accumulates, self._model)
        if is_first:
            self._say(f"CUDA graphs: on, from this step{casts}")
        return graphs

    def _require_chances(self, device: torch.device) -> None:
        obstacle = hook_of_others(self._model) or lack_of_memory(device)
        if obstacle is not None:
            raise GraphError(f"{obstacle}; --cuda_graphs true tries them anyway")

    def _rehearsed(self, batch: Inputs, inputs: Inputs) -> Reference:
        # Try sharing and the reserved sizes on throwaway gradients before the capture, which allows no compilation of
        # kernels; and no training step should be the first to meet a kernel that fails.
        reference = Reference(self._loss, batch.ids_BT, batch.targets_BT)
        with side_effects_undone(batch.ids_BT.device), gradients_set_aside(reference.leaves), self._sharing():
            self._loss(inputs.ids_BT, inputs.targets_BT).backward()
            # If neither holds, memory may not suffice for gradients besides a forward pass.
            if self._accumulates or self._options.careful:
                self._loss(inputs.ids_BT, inputs.targets_BT).backward()
        return reference

    def _keep_casts(self, device: torch.device) -> str:
        """Keep the casts of weights; if memory is short, return the reason not to, which does not stop graphs."""
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
        # No reference to self: graphs should be freed with the run, not when the garbage collector finds a cycle.
        abreast = side_by_side if self._options.abreast else contextlib.nullcontext
        return SharingCapture(self._options.make_capture(), self._sharing, abreast)

    def _tried(self, attempt: Callable[[], _Result]) -> _Result | None:
        # None on failure, instead of raising: the error's traceback would keep the memory of a pass alive.
        try:
            return attempt()
        except Exception as error:
            self._stop(error)
            return None

    def _stop(self, error: Exception) -> None:
        self._is_off, self._graphs = True, None
        self._weights.clear()
        reason = reason_of(error)
        if not self._options.careful:
            raise SettingsError(f"cuda_graphs: true cannot work here ({reason}); set cuda_graphs: auto") from error
        self._say(f"CUDA graphs: off ({reason})")
