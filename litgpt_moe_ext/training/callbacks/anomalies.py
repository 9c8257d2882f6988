"""Steps whose gradient is not finite, or far larger than usual.

LitGPT's `clip_gradients` ends a run at the first gradient that is not finite, with only a traceback. Here the step is
skipped, or the run ends, before the weights change, and everything needed to reproduce the step is saved: its tokens,
the data position and the random generators.
"""

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.files.durable import cut_off
from litgpt_moe_ext.moe.balancing.bias import forget_step
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.logs import ANOMALIES_FOLDER
from litgpt_moe_ext.training.parallel import random_state
from litgpt_moe_ext.training.settings import AnomalyArgs
from litgpt_moe_ext.training.steps.batches import unwrapped


class GradientGuard(Callback):
    """Judge the gradient norm of every step before the optimizer uses it.

    The norms of the last steps, from which medians are computed, are part of the checkpoint, so a resumed run judges
    like an uninterrupted one.

    Args:
        args: What to do.
        out_dir: The run's directory; batches are saved in `anomalies` there.
        rank: Rank of this process, as each has its own batches.
        say: Told about every skipped step.
    """

    def __init__(self, args: AnomalyArgs, out_dir: Path, rank: int, say: Callable[[str], None]) -> None:
        self._args, self._folder, self._rank, self._say = args, out_dir / ANOMALIES_FOLDER, rank, say
        self._norms: deque[float] = deque(maxlen=args.window)
        self._skipped_in_a_row = 0
        self._batches: list[Tensor] = []
        self._before: dict[str, Any] = {}
        self.skipped = 0

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Remember the data position before the first batch of a step."""
        loader = unwrapped(state["train_dataloader"])
        position = loader.state_dict() if hasattr(loader, "state_dict") else None
        self._before = {"step": state["step_count"], "iteration": state["iter_num"], "data": position}
        self._batches = []

    def on_batch(self, batch: Tensor, waited: float) -> None:
        """Keep a reference to a batch until the step is over."""
        self._batches.append(batch)

    def on_gradients_clipped(self, norm: Tensor | None, module: torch.nn.Module, optimizer: Any, scaled: bool) -> None:
        """Let the step pass, skip it, or end the run."""
        if norm is None:
            return
        value = float(norm)
        if scaled and not math.isfinite(value):
            # The gradient scaler skips the step itself and tries a smaller scale.
            forget_step(routers_of(module).values())
            return
        found = self._anomaly(value)
        if found is None:
            self._skipped_in_a_row = 0
        else:
            self._act(*found, module, optimizer)

    def _anomaly(self, norm: float) -> tuple[str, str] | None:
        """Return what is wrong with a gradient norm and the setting that says what to do, or None."""
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}", "on_nonfinite"
        if self._args.spike_factor is None:
            return None
        median = statistics.median(self._norms) if len(self._norms) == self._args.window else math.inf
        # Spikes too: a single one does not move the median, and a lasting change must become the new normal.
        self._norms.append(norm)
        if norm <= self._args.spike_factor * median:
            return None
        return (
            f"the gradient norm is {norm:.3g}, the median of the last {self._args.window} is {median:.3g}",
            "on_spike",
        )

    def _act(self, problem: str, setting: str, module: torch.nn.Module, optimizer: Any) -> None:
        # This step's loss scale may not be finite and must not leak into another training in the same process.
        forget_scale()
        where = self._save(problem)
        step = self._before["step"]
        if getattr(self._args, setting) == "stop":
            raise TrainingStopped(
                f"in step {step + 1} {problem}. The weights are still those after step {step}; the batch is {where}. "
                f"--resume auto continues from the last checkpoint; --anomaly.{setting} skip leaves such steps out."
            )
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._args.max_consecutive:
            skipped = "1 step was" if self._skipped_in_a_row == 1 else f"{self._skipped_in_a_row} steps in a row were"
            raise TrainingStopped(
                f"{skipped} skipped (anomaly.max_consecutive), the last because in step {step + 1} {problem}; its "
                f"batch is {where}. "
                "A lower learning rate or a longer warm-up may help."
            )
        self._say(f"  step {step + 1} is skipped: {problem}; its batch is {where}")
        # Optimizers skip parameters without gradient, so neither weights nor moments change.
        optimizer.zero_grad(set_to_none=True)
        forget_step(routers_of(module).values())

    def _save(self, problem: str) -> str:
        """Save what the step can be repeated from; return where it is, or why it is not there."""
        file = self._folder / f"step-{self._before['step'] + 1:08d}-rank-{self._rank}.pt"
        batches = [batch.cpu().as_subclass(Tensor) for batch in self._batches]
        rng = random_state.of_this_rank(self._batches[0].device if self._batches else torch.device("cpu"))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save({**self._before, "problem": problem, "batches": batches, "rng": rng}, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: from torch, if it cannot write
            with contextlib.suppress(OSError):
                file.unlink()
            reason = (
                "it was cut off, as on a full disk" if cut_off(error) else getattr(error, "strerror", None) or error
            )
            return f"not in {file}, which could not be written ({reason})"
        return f"in {file}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the judgement of the next steps depends on."""
        return {"norms": list(self._norms), "skipped_in_a_row": self._skipped_in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._norms.extend(state["norms"])
        self._skipped_in_a_row, self.skipped = state["skipped_in_a_row"], state["skipped"]
