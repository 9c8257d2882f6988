"""Where the hooks hang on LitGPT's training loop.

`litgpt.pretrain.main` looks its helpers up in its module when it calls them. For the time of one run some of these
names point to functions of ours, which do their part and, where there is one, call LitGPT's original:

| name in `litgpt.pretrain` | what ours does                                                                     |
| ------------------------- | ---------------------------------------------------------------------------------- |
| `fit`                     | keeps hold of the training state; listens for signals while it runs                |
| `CycleIterator`           | acts between two iterations: interruptions, limits, restored random generators      |
| `save_checkpoint`         | writes under a temporary name, adds the random generators, renames                 |
| `save_hyperparameters`    | writes the values that the run uses                                                |
| `find_resume_path`        | chooses the newest whole checkpoint                                                |
| `chunked_cross_entropy`   | does the output head's work as well, where asked                                   |
| `get_dataloaders`         | lets a data position be read with another number of processes                     |
| `get_lr`                  | follows the run's schedule                                                         |
| `measure_flops`           | counts for the length of the training's sequences, not the model's longest         |
| `instantiate_torch_optimizer` | sorts the parameters into groups                                               |
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import litgpt.pretrain
from litgpt.args import TrainArgs

from litgpt_moe_ext.model_size import count_flops
from litgpt_moe_ext.moe.gradient_injection import forget_scale
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss
from litgpt_moe_ext.training.checkpoint import hyperparameters
from litgpt_moe_ext.training.checkpoint import store as checkpoints
from litgpt_moe_ext.training.checkpoint.progress import MODEL_FILE, batch_of, newest_first
from litgpt_moe_ext.training.checkpoint.resharding import convert_iterations, convert_position
from litgpt_moe_ext.training.control import StepLimits, StopRequests, TrainingInterrupted, TrainingStopped
from litgpt_moe_ext.training.optim.optimization import Optimization, schedule_steps
from litgpt_moe_ext.training.parallel import random_state


class HookedLoop:
    """LitGPT's loop with checkpoints, interruptions and limits of ours.

    Args:
        fabric: The running `TrainingFabric`.
        train: Training arguments.
        total_steps: Optimizer steps of the whole training.
        out_dir: The run's directory.
        tokenizer_dir: Tokenizer to copy into checkpoints, or None.
        resume_file: Model file to resume from, or False.
        settings: The run's settings as plain data, for `hyperparameters.yaml`.
        optimization: Schedule and parameter groups.
        on_save_error: What a checkpoint that cannot be written means for the run.
        fused_loss: What does the output head's work, or None if the head does it.

    Attributes:
        trained_iterations: Iterations of this run (not of earlier ones it resumed), once it has ended.
        seconds: How long they took, validation and checkpoints included.
    """

    def __init__(
        self,
        fabric: Any,
        train: TrainArgs,
        total_steps: int,
        out_dir: Path,
        tokenizer_dir: Path | None,
        resume_file: Path | bool,
        settings: dict[str, Any],
        optimization: Optimization,
        on_save_error: Literal["stop", "continue"],
        fused_loss: FusedLoss | None,
    ) -> None:
        self.fabric = fabric
        self.train = train
        self.total_steps = total_steps
        self.out_dir = out_dir
        self.tokenizer_dir = tokenizer_dir
        self.resume_file = resume_file
        self.settings = settings
        self.optimization = optimization
        self.on_save_error = on_save_error
        self.fused_loss = fused_loss
        self.stop_requests = StopRequests(fabric.print)
        self.state: dict[str, Any] = {}
        self.trained_iterations = 0
        self.seconds = 0.0
        self.limits_reached = False
        self.last_saved: Path | None = None
        self._random_state_settled = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the hooks into `litgpt.pretrain` for the time of the scope."""
        original_fit, original_save = litgpt.pretrain.fit, litgpt.pretrain.save_checkpoint

        def fit(*args: Any, **kwargs: Any) -> None:
            self.fabric.state = self.state = kwargs["state"]
            self._adapt_iterations()
            self.limits = StepLimits(self.total_steps, self.train.max_time)
            first_iteration, started = self.state["iter_num"], time.perf_counter()
            self.fabric.call("on_fit_begin", resume_dir=self.resume_file.parent if self.resume_file else None)
            try:
                with self.stop_requests.listening():
                    original_fit(*args, **kwargs)
            except Exception:
                if self.limits_reached:
                    # Validation failed after the last step: the training must not be lost with it.
                    self.save("final")
                raise
            finally:
                self.trained_iterations = self.state["iter_num"] - first_iteration
                self.seconds = time.perf_counter() - started
                # LitGPT's measurement of FLOPs leaves the scale of a loss without data where no step followed it.
                forget_scale()

        def save_checkpoint(fabric: Any, state: dict, tokenizer_dir: Path | None, checkpoint_file: Path) -> None:
            try:
                checkpoints.save_whole(original_save, fabric, state, tokenizer_dir, checkpoint_file)
            except checkpoints.SaveError as error:
                return self._not_saved(error, checkpoint_file.parent)
            self.last_saved = checkpoint_file.parent
            fabric.call("on_checkpoint_saved", directory=checkpoint_file.parent)

        loop = self

        class CycleIterator(litgpt.pretrain.CycleIterator):
            def __next__(self) -> Any:
                loop._between_iterations()
                asked = time.perf_counter()
                batch = super().__next__()
                waited = time.perf_counter() - asked
                loop._settle_random_state()
                loop.fabric.call("on_batch", batch=batch, waited=waited)
                return batch

        hooks = {
            "fit": fit,
            "save_checkpoint": save_checkpoint,
            "CycleIterator": CycleIterator,
            "save_hyperparameters": lambda _function, directory: hyperparameters.save(self.settings, directory),
            "find_resume_path": lambda *_: self.resume_file,
            "get_lr": self._learning_rate,
            "measure_flops": self._measure_flops,
            "get_dataloaders": self._adaptable(litgpt.pretrain.get_dataloaders),
            "instantiate_torch_optimizer": self.optimization.make_optimizer,
        }
        if self.fused_loss is not None:
            hooks["chunked_cross_entropy"] = self.fused_loss.wrap(litgpt.pretrain.chunked_cross_entropy)
        originals = {name: getattr(litgpt.pretrain, name) for name in hooks}
        vars(litgpt.pretrain).update(hooks)
        try:
            yield
        finally:
            vars(litgpt.pretrain).update(originals)

    def _adaptable(self, get_dataloaders: Callable[..., tuple]) -> Callable[..., tuple]:
        def get_adaptable_dataloaders(*args: Any, **kwargs: Any) -> tuple:
            train, val = get_dataloaders(*args, **kwargs)
            if hasattr(train, "load_state_dict"):
                load = train.load_state_dict

                def load_state_dict(state: dict[str, Any]) -> None:
                    load(convert_position(state, self.train.micro_batch_size, self.fabric.world_size))

                train.load_state_dict = load_state_dict
            return train, val

        return get_adaptable_dataloaders

    def _adapt_iterations(self) -> None:
        if not self.resume_file:
            return
        saved = batch_of(self.resume_file.parent)
        if saved is None:
            return
        batch = self.train.micro_batch_size * self.fabric.world_size
        accumulation = self.train.gradient_accumulation_iters(self.fabric.world_size)
        self.state["iter_num"] = convert_iterations(self.state["iter_num"], saved, batch, accumulation)

    def save(self, name: str) -> None:
        """Save the present state under a name in the run's directory; every process must call."""
        litgpt.pretrain.save_checkpoint(self.fabric, self.state, self.tokenizer_dir, self.out_dir / name / MODEL_FILE)

    def _not_saved(self, error: checkpoints.SaveError, directory: Path) -> None:
        if self.on_save_error == "continue" and directory.name != "final":
            self.fabric.print(f"  {error}. Training goes on without it (checkpoint.on_save_error: continue).")
            return
        kept = [str(path) for path in newest_first(self.out_dir)[:1]]
        raise TrainingStopped(
            f"{error}. The checkpoints before it are whole{', the newest is ' + kept[0] if kept else ''}. Free some "
            "space and continue with --resume auto; --checkpoint.on_save_error continue trains on without checkpoints."
        ) from error

    def _between_iterations(self) -> None:
        accumulation = self.train.gradient_accumulation_iters(self.fabric.world_size)
        if self.state["iter_num"] % accumulation:
            # Gradients that wait for the rest of their step are not part of a checkpoint.
            return
        step = self.state["step_count"]
        if signal_number := self.stop_requests.agreed(self.fabric):
            directory = self.out_dir / f"step-{step:08d}"
            if step and directory != self.last_saved:
                self.save(directory.name)
            raise TrainingInterrupted(signal_number, directory if step else None)
        if self.limits.reached(step, self.fabric):
            # Ends LitGPT's `for` loop; the final validation and checkpoint follow.
            self.limits_reached = True
            self.fabric.call("on_last_step", state=self.state)
            raise StopIteration
        self.fabric.call("on_step_begin", state=self.state)

    def _measure_flops(self, model: Any, _forward: Any, _loss: Any) -> int:
        length = self.train.max_seq_length or model.config.block_size
        sequence = count_flops(model.config, length, training=True)
        self.fabric.call("on_flops_counted", flops_per_token=sequence / length)
        return self.train.micro_batch_size * sequence

    def _learning_rate(self, peak: float, _iteration: int, warmup_iters: int, max_iters: int, floor: float) -> float:
        accumulation = self.train.gradient_accumulation_iters(self.fabric.world_size)
        warmup_steps, total_steps = schedule_steps(warmup_iters, max_iters, accumulation)
        return self.optimization.learning_rate(self.state["step_count"], peak, floor, warmup_steps, total_steps)

    def _settle_random_state(self) -> None:
        # At the first batch, because building the data iterator and the sanity check of the validation draw random
        # numbers that an uninterrupted run did not draw here.
        if self._random_state_settled:
            return
        self._random_state_settled = True
        fabric = self.fabric
        saved, fabric.resumed_rng = fabric.resumed_rng, None
        if saved is not None and len(saved) == fabric.world_size:
            if not random_state.restore(saved[fabric.global_rank], fabric.device):
                fabric.print("The checkpoint comes from another type of device, whose random generator starts anew.")
            return
        if saved is not None:
            fabric.print(
                f"The checkpoint has the random generators of {len(saved)} processes and there are "
                f"{fabric.world_size} now: they start anew, which matters only where training draws from them."
            )
        random_state.part_ways(self.settings.get("seed", 0), fabric.global_rank, fabric.world_size, fabric.step)
