"""The hooks in LitGPT's training loop.

`litgpt.pretrain.main` looks up its helpers in its module when it calls them. During a run, some of these names point
to our functions, which add their part and usually call LitGPT's original:

| name in `litgpt.pretrain` | what our function does                                                             |
| ------------------------- | ---------------------------------------------------------------------------------- |
| `fit`                     | keeps the training state; starts listening for signals                             |
| `CycleIterator`           | acts between iterations: interruptions, limits, restored random generators         |
| `save_checkpoint`         | writes under a temporary name, adds the random generators, renames                 |
| `save_hyperparameters`    | writes the values that the run uses                                                |
| `find_resume_path`        | returns the checkpoint that `find_start` chose                                     |
| `chunked_cross_entropy`   | averages over the tokens of a step; may also compute the head or the whole model   |
| `validate`                | averages over tokens; logs the initial validation; reacts to signals               |
| `RunningMean`             | averages losses without waiting for the device                                     |
| `math`                    | its `exp` takes any loss, for the perplexity; Python's ends the run above 709      |
| `get_dataloaders`         | makes the data position readable with another number of processes                  |
| `get_lr`                  | follows the run's schedule                                                         |
| `measure_flops`           | counts for the training's sequence length, not the model's maximum                 |
| `instantiate_torch_optimizer` | sorts the parameters into groups                                               |
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import litgpt.pretrain
from torch import Tensor
from torch.utils.data import DataLoader

from litgpt_moe_ext.attention.document_room import document_room
from litgpt_moe_ext.data.loader import TokenLoader, corpora_of
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.perplexity import exp
from litgpt_moe_ext.host.replaced import replaced
from litgpt_moe_ext.model_size import count_flops
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale
from litgpt_moe_ext.training.checkpoint import hyperparameters
from litgpt_moe_ext.training.checkpoint.progress import FINAL
from litgpt_moe_ext.training.checkpoint.resharding import convert_position, inexact_note
from litgpt_moe_ext.training.checkpoint.writer import CheckpointWriter
from litgpt_moe_ext.training.control import TrainingInterrupted
from litgpt_moe_ext.training.optim.make import make_optimizer
from litgpt_moe_ext.training.optim.schedules import Schedule, schedule_steps
from litgpt_moe_ext.training.parallel.agreement import Agreement
from litgpt_moe_ext.training.parallel.sameness import require_same_data
from litgpt_moe_ext.training.steps.batches import StepBatches, can_pad, counts_for_loss
from litgpt_moe_ext.training.steps.epochs import epoch_of
from litgpt_moe_ext.training.steps.first_batches import FirstBatches
from litgpt_moe_ext.training.steps.handover import Handover, loss_of_logits
from litgpt_moe_ext.training.steps.losses import RunningMean, TokenMeans
from litgpt_moe_ext.training.steps.validation import StoppableValidation

if TYPE_CHECKING:
    import litgpt.args
    import torch

    from litgpt_moe_ext.training.phases.equip import Equipment
    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.start import Start


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        iterations: Iterations of this run, without those of the runs it continues.
        seconds: Time they took, validation and checkpoints included.
        best_loss: Lowest validation loss so far, earlier runs included.
        step: Optimizer steps so far, earlier runs included.
        padding: Fraction of this run's tokens that was padding; None if rows cannot be padded.
    """

    iterations: int
    seconds: float
    best_loss: float | None
    step: int
    padding: float | None


class HookedLoop:
    """LitGPT's loop with our checkpoints, interruptions and limits.

    Args:
        launched: The connected processes.
        start: What the run starts from.
        tokenizer_dir: Tokenizer to copy into checkpoints, or None.
        equipment: How the model, its head and its loss are computed.

    Attributes:
        writer: Saves checkpoints.
    """

    def __init__(self, launched: Launched, start: Start, tokenizer_dir: Path | None, equipment: Equipment) -> None:
        self._plan, self._start, self._equipment = launched.plan, start, equipment
        self.writer = CheckpointWriter(launched, tokenizer_dir, litgpt.pretrain.save_checkpoint, start.resume_dir)
        self.fabric = fabric = launched.fabric
        self.train = launched.plan.train
        self._accumulation = launched.accumulation
        self._listening = contextlib.ExitStack()
        self._agreement = Agreement(
            fabric, lambda: (fabric.stop_requests.received, launched.reporter.deadline.is_over, self.writer.is_due)
        )
        self._iterations = 0
        self._started: float | None = None
        self._seconds = 0.0
        self._limits_reached = False
        self._schedule: Schedule | None = None
        self._eval: litgpt.args.EvalArgs
        self._val_dataloader: Any = None
        self._first_batches = FirstBatches(self._plan.sequence_length, self._plan.config.padded_vocab_size or 0)
        self._validation = StoppableValidation(fabric, self._on_signal_in_validation, self._first_batches)
        self._validated_step: int | None = None
        self._resumed_at: dict[str, Any] | None = None  # position in the data, until the first batch
        self._means = TokenMeans(fabric.world_size)
        self._handover = Handover(equipment.graphs, fabric.print, document_room(launched.plan.config))
        fabric.run_task = self._handover.run_task
        self._batches = StepBatches(self._targets, self._accumulation, fabric.world_size)
        fabric.add_callback(self._agreement, first=True)
        fabric.add_callback(self._batches)
        fabric.add_callback(self._means.corpora)
        fabric.add_callback(self._validation)

    def _targets(self, rows_BT: Tensor) -> tuple[Tensor]:
        """Return which targets of a micro-batch count for the loss, bool, (B, T)."""
        return (counts_for_loss(rows_BT[:, 1 : self._plan.sequence_length + 1]),)

    def outcome(self, best_loss: float | None) -> Outcome:
        """Return the result of the run; call it when the loop has ended.

        Args:
            best_loss: Lowest validation loss so far.
        """
        return Outcome(self._iterations, self._seconds, best_loss, self.fabric.step, self._batches.padding)

    def save_step(self, last: bool = False) -> Path | None:
        """Save the state after the last step unless already saved, and return where; None before the first step.

        Args:
            last: Whether the run ends with this checkpoint.
        """
        if not (step := self.fabric.state["step_count"]):
            return None
        directory = self._plan.out_dir / f"step-{step:08d}"
        if directory != self.writer.last_saved:
            self.writer.save(directory.name, last=last)
        return directory

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Install the hooks in `litgpt.pretrain` within the scope.

        Raises:
            TrainingInterrupted: At the end of the scope, if a signal came after the last step.
        """
        precision = self.fabric.strategy.precision
        cross_entropy = loss_of_logits(litgpt.pretrain.chunked_cross_entropy, precision)
        if self._equipment.fused_loss is not None:
            cross_entropy = self._equipment.fused_loss.wrap(cross_entropy)
        hooks: dict[str, Any] = {
            "fit": self._watched(litgpt.pretrain.fit),
            "save_checkpoint": self.writer.save_checkpoint,
            "CycleIterator": self._cycle_iterator(litgpt.pretrain.CycleIterator),
            "save_hyperparameters": lambda _function, directory: hyperparameters.save(self._plan.plain, directory),
            "find_resume_path": lambda *_: self._start.resume_file or False,
            "get_lr": self._learning_rate,
            "measure_flops": self._measure_flops,
            "get_dataloaders": self._adaptable(litgpt.pretrain.get_dataloaders),
            "instantiate_torch_optimizer": self._make_optimizer,
            "chunked_cross_entropy": self._means.wrap_loss(self._handover.wrap(cross_entropy)),
            "validate": self._validate(litgpt.pretrain.validate),
            "RunningMean": RunningMean,
            "math": SimpleNamespace(**{**vars(math), "exp": exp}),
        }
        with replaced(litgpt.pretrain, hooks), self._listening:
            yield
            signal_number, *_ = self._agreement.reached()
            if signal_number:
                raise TrainingInterrupted(signal_number, self.writer.last_saved)

    def _watched(self, original: Callable[..., None]) -> Callable[..., None]:
        def fit(*args: Any, **kwargs: Any) -> None:
            self.fabric.state = kwargs["state"]
            self._eval, self._val_dataloader = kwargs["eval"], kwargs["val_dataloader"]
            if self._start.sequences is not None:  # LitGPT counts micro-batches, whose size may have changed
                batch = self.train.micro_batch_size * self.fabric.world_size
                self.fabric.state["iter_num"] = self._start.sequences // batch
            self._batches.counts = can_pad(kwargs["train_dataloader"])
            first_iteration = self.fabric.state["iter_num"]
            self.fabric.call("on_fit_begin", resume_dir=self._start.resume_dir)
            handing_over = self._handover.installed(self.fabric.state["model"], self.fabric.strategy)
            # LitGPT saves `final` after this function; listen until then.
            self._listening.enter_context(self.fabric.stop_requests.listening())
            try:
                with handing_over:
                    original(*args, **kwargs)
            except Exception:
                if self._limits_reached:
                    # The final validation failed, but the trained weights must not be lost.
                    self.writer.save(FINAL)
                raise
            finally:
                self._iterations = self.fabric.state["iter_num"] - first_iteration
                if self._started is not None:
                    self._seconds = time.perf_counter() - self._started
                # If no step followed LitGPT's FLOPs measurement, the loss scale it left behind holds no data.
                forget_scale()

        return fit

    def _cycle_iterator(self, original: type) -> type:
        loop = self

        class CycleIterator(original):
            def __next__(self) -> Any:
                loop._between_iterations()
                try:
                    batch = loop._batches.next(self._fetch, loop.fabric.state["iter_num"])
                except StopIteration as nothing:  # would end the loop as if it had trained
                    raise SettingsError(
                        f"data: too little for one batch of train.micro_batch_size: {loop.train.micro_batch_size} "
                        "sequences on each process; set a smaller one, or give more data"
                    ) from nothing
                # Not earlier: a resumed run draws random numbers to build the data iterator and in LitGPT's sanity
                # check, which an uninterrupted run did not draw at this point.
                loop.fabric.random_streams.restore_or_seed(loop._plan.settings.seed)
                loop._means.weights = batch.weights
                loop.fabric.call("on_batch", batch=batch.data, waited=batch.waited)
                loop._handover.expect_batch()
                return batch.data

            def _fetch(self) -> Any:
                batch = super().__next__()
                loop._resumed_at = None
                loop._first_batches.check("train_dataloader", batch)
                return batch

        return CycleIterator

    def _validate(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        validate = self._means.wrap_validation(self._validation.wrap(self._handover.wrap_validation(original)))

        def noted_validate(*args: Any, verbose: bool = True, **kwargs: Any) -> Tensor:
            loss = validate(*args, verbose=verbose, **kwargs)
            if verbose:  # not LitGPT's sanity check
                self._validated_step = self.fabric.state["step_count"]
                if self._started is None:
                    # LitGPT prints the initial validation but does not log it.
                    self.fabric.log_dict({"val_loss": loss.item()})
            return loss

        return noted_validate

    def _adaptable(self, get_dataloaders: Callable[..., tuple]) -> Callable[..., tuple]:
        def get_adaptable_dataloaders(*args: Any, **kwargs: Any) -> tuple:
            train, val = get_dataloaders(*args, **kwargs)
            for name, loader in (("train_dataloader", train), ("val_dataloader", val)):
                if not isinstance(loader, DataLoader):
                    raise SettingsError(
                        f"data: {name} returns a {type(loader).__name__}, which Fabric cannot set up; return a "
                        "torch.utils.data.DataLoader or an instance of a subclass"
                    )
            if not (hasattr(train, "state_dict") and hasattr(train, "load_state_dict")):
                # The checkpoint would contain the whole loader with its data, and could not be loaded.
                raise SettingsError(
                    f"data: train_dataloader returns a {type(train).__name__} without state_dict and load_state_dict, "
                    "which a resumed run needs; return one that has them, such as litdata's StreamingDataLoader"
                )
            if fraction := self.train.lr_warmup_fraction:
                epoch_of(train, f"train.lr_warmup_fraction: {fraction}", "train.lr_warmup_steps")
            if isinstance(train, TokenLoader):
                require_same_data(self.fabric, corpora_of(train.state_dict()))
            load, position = train.load_state_dict, train.state_dict

            def load_state_dict(state: dict[str, Any]) -> None:
                self._resumed_at = convert_position(state, self.train.micro_batch_size, self.fabric.world_size)
                if note := inexact_note(state):
                    self.fabric.print(note)
                load(self._resumed_at)

            def state_dict() -> dict[str, Any]:
                # Before its first batch litdata's loader returns another one than it has loaded, with the next worker.
                return position() if self._resumed_at is None else self._resumed_at

            train.load_state_dict, train.state_dict = load_state_dict, state_dict
            return train, val

        return get_adaptable_dataloaders

    def _between_iterations(self) -> None:
        self._started = self._started or time.perf_counter()
        if self.fabric.state["iter_num"] % self._accumulation:
            # Checkpoints do not hold the gradients of an unfinished step.
            return
        if self._validation.is_due:
            loss = litgpt.pretrain.validate(
                self.fabric, self.fabric.state["model"], self._val_dataloader, max_iters=self._eval.max_iters
            )
            self.fabric.log_dict({"val_loss": loss.item()})
        step = self.fabric.state["step_count"]
        signal_number, late, due = self._agreement.reached()
        signal_number = signal_number or self.fabric.interrupted_by
        is_last = late or step >= self._plan.total_steps
        if signal_number:
            self._interrupt(signal_number)
        if due and not is_last:
            self.save_step()
        if is_last:
            # End LitGPT's `for` loop; the final validation and checkpoint follow. Left alone, the loop would fetch one
            # more batch without training on it, and the final checkpoint's data position would be one batch too far.
            self._limits_reached = True
            if self._validated_step == step:
                self._eval.final_validation = False  # these very weights have been validated
            self.fabric.call("on_last_step", state=self.fabric.state)
            raise StopIteration
        self.fabric.call("on_step_begin", state=self.fabric.state)
        if self.fabric.interrupted_by:  # during the callbacks
            self._interrupt(self.fabric.interrupted_by)
        self.fabric.require_training_mode()

    def _on_signal_in_validation(self, signal_number: int) -> None:
        """React to a signal that arrived during a validation."""
        if not self._limits_reached:
            self._interrupt(signal_number)
        # Only the final validation is left: save the state first, then let it continue.
        self.save_step()

    def _interrupt(self, signal_number: int) -> NoReturn:
        raise TrainingInterrupted(signal_number, self.save_step(last=True))

    def _make_optimizer(self, optimizer: str | dict, _parameters: Any, **_options: Any) -> torch.optim.Optimizer:
        fabric, groups = self.fabric, self._plan.settings.parameter_groups
        return make_optimizer(optimizer, fabric.model, groups, fabric.run_task, fabric.strategy.steps_in_parts)

    def _measure_flops(self, model: Any, _forward: Any, _loss: Any) -> int:
        length = self._plan.sequence_length
        sequence = count_flops(model.config, length, training=True)
        self.fabric.call("on_flops_counted", flops_per_token=sequence / length)
        return self.train.micro_batch_size * sequence

    def _learning_rate(self, peak: float, _iteration: int, warmup_iters: int, max_iters: int, floor: float) -> float:
        if self._schedule is None:
            steps = schedule_steps(warmup_iters, max_iters, self._accumulation)
            self._schedule = Schedule(self._plan.settings.schedule, peak, floor, *steps)
        return self._schedule.rate(self.fabric.step - self._plan.steps_ahead)
