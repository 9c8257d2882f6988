"""The learning rate as a function of the number of finished optimizer steps.

A linear warm-up is followed by one of torch's schedulers. The scheduler has a throw-away optimizer, so what it computes
depends on the step number alone: there is no state to save, and a resumed run finds the same rates.

LitGPT 0.5.13 computes a rate per iteration, so that with gradient accumulation an optimizer step is taken at the rate
of its last micro batch, and the first step of a warm-up has rate 0. Here rates are counted in optimizer steps, and the
warm-up rises from `peak / warmup_steps` to `peak`.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch.optim import lr_scheduler

from litgpt_moe_ext.training.settings import ScheduleArgs, TrainArgs

if TYPE_CHECKING:
    import litgpt.args


class Schedule:
    """Learning rates of a training run.

    Args:
        args: The shape.
        peak: Highest rate, that of the optimizer.
        floor: Rate at the end (`train.min_lr`); unused by `constant`.
        warmup_steps: Steps of rising rate; for `onecycle`, those until the peak.
        total_steps: Optimizer steps of the whole training.
    """

    def __init__(self, args: ScheduleArgs, peak: float, floor: float, warmup_steps: int, total_steps: int) -> None:
        self._args, self._peak, self._floor = args, peak, floor
        self._total_steps = total_steps
        self._warmup_steps = min(warmup_steps, total_steps)
        # OneCycle has a warm-up of its own shape.
        self._ramp_steps = 0 if args.name == "onecycle" else self._warmup_steps
        self._length = max(1, total_steps - self._ramp_steps)
        self._scheduler = self._make_scheduler()

    def rate(self, step: int) -> float:
        """Return the learning rate of the optimizer step that follows `step` finished ones."""
        if step < self._ramp_steps:
            return self._peak * (step + 1) / self._ramp_steps
        # Past the end (when a finished run is resumed) the last rate stays.
        position = min(step - self._ramp_steps, self._last_position)
        if position < self._scheduler.last_epoch:
            self._scheduler = self._make_scheduler()
        while self._scheduler.last_epoch < position:
            self._scheduler.step()
        return self._scheduler.optimizer.param_groups[0]["lr"]

    @property
    def _last_position(self) -> int:
        # OneCycle reaches its end at the last step.
        return self._length - 1 if self._args.name == "onecycle" else self._length

    def _make_scheduler(self) -> lr_scheduler.LRScheduler:
        peak, floor, length = self._peak, self._floor, self._length
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        optimizer._opt_called = True  # pyrefly: ignore[missing-attribute] or torch warns that it never stepped
        match self._args.name:
            case "cosine":
                return lr_scheduler.CosineAnnealingLR(optimizer, T_max=length, eta_min=floor)
            case "linear":
                return lr_scheduler.LinearLR(optimizer, 1.0, _ratio(floor, peak), total_iters=length)
            case "constant":
                return lr_scheduler.ConstantLR(optimizer, factor=1.0)
            case "onecycle":
                first = peak / 25
                # torch divides by zero if a phase has only one step.
                rising = self._warmup_steps if self._warmup_steps >= 2 else 0
                return lr_scheduler.OneCycleLR(
                    optimizer,
                    max_lr=peak,
                    total_steps=length,
                    pct_start=rising / length,
                    div_factor=25,
                    final_div_factor=first / floor if floor else math.inf,
                    cycle_momentum=False,
                )
            case "wsd":
                decay_steps = max(1, round(self._args.decay_fraction * self._total_steps))
                stable_steps = max(0, length - decay_steps)
                slope = (1 - _ratio(floor, peak)) / (length - stable_steps)
                return lr_scheduler.LambdaLR(optimizer, lambda k: 1 - slope * max(0, k - stable_steps))
            case "inverse_sqrt":
                reference = max(1, self._warmup_steps)
                return lr_scheduler.LambdaLR(
                    optimizer, lambda k: max(_ratio(floor, peak), math.sqrt(reference / (reference + k)))
                )


def _ratio(floor: float, peak: float) -> float:
    return floor / peak if peak else 1.0


def count_steps(train: "litgpt.args.TrainArgs | TrainArgs", tokens_per_step: int, ahead: int = 0) -> int:
    """Return the number of optimizer steps of a whole training; `ahead` is `Plan.steps_ahead`."""
    steps = (train.max_tokens or 0) // tokens_per_step + ahead
    return steps if train.max_steps is None else min(steps, train.max_steps)


def schedule_steps(warmup_iters: int, max_iters: int, accumulation: int) -> tuple[int, int]:
    """Return the optimizer steps of the warm-up and of the whole schedule, from LitGPT's iterations."""
    return -(-warmup_iters // accumulation), max_iters // accumulation
