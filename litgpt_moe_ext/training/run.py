"""One training run, from launching the processes to the closing words."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import litgpt.pretrain
import torch
from lightning.fabric.loggers import CSVLogger
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer
from litgpt.utils import check_nvlink_connectivity, choose_logger, parse_devices

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from litgpt_moe_ext.training.callbacks.anomalies import GradientGuard
from litgpt_moe_ext.training.callbacks.ema import WeightAverage
from litgpt_moe_ext.training.callbacks.expert_images import ExpertImages, shows_pictures
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss, require_torch
from litgpt_moe_ext.training.callbacks.kernel_report import KernelReport
from litgpt_moe_ext.training.callbacks.progress import Reporter, format_count
from litgpt_moe_ext.training.callbacks.retention import Retention
from litgpt_moe_ext.training.callbacks.step_metrics import ExpertLoad, GradientNorm
from litgpt_moe_ext.training.callbacks.telemetry import Telemetry, peak_flops
from litgpt_moe_ext.training.checkpoint import store as checkpoints
from litgpt_moe_ext.training.checkpoint.compatibility import require_same_model, require_same_optimizer
from litgpt_moe_ext.training.checkpoint.lock import OutDirLock
from litgpt_moe_ext.training.checkpoint.progress import BEST, next_attempt, step_of
from litgpt_moe_ext.training.checkpoint.resume import agree, find_resume_file
from litgpt_moe_ext.training.checkpoint.resume_notes import resume_notes
from litgpt_moe_ext.training.checks import open_tokenizer
from litgpt_moe_ext.training.compilation import CompileDecision, compile_scope, decide, probe_platform
from litgpt_moe_ext.training.fabric import TrainingFabric
from litgpt_moe_ext.training.loop import HookedLoop
from litgpt_moe_ext.training.optim.optimization import Optimization, count_steps
from litgpt_moe_ext.training.parallel import topology
from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision
from litgpt_moe_ext.training.parallel.launch import Processes, cluster_plugin, started_processes
from litgpt_moe_ext.training.parallel.lost_processes import end_together
from litgpt_moe_ext.training.parallel.strategies import make_strategy, single_process_note
from litgpt_moe_ext.training.settings import (
    AnomalyArgs,
    CheckpointArgs,
    DistributedArgs,
    EmaArgs,
    EvaluateArgs,
    ParameterGroupArgs,
    SampleArgs,
    ScheduleArgs,
)


class Run:
    """Carries a run through its phases: launch, find_checkpoint, prepare_data, train.

    Args:
        config: The model.
        train: Training arguments.
        out_dir: Directory for checkpoints and logs.
        settings: All settings as plain data, for the checkpoints.
        progress: As `Reporter`.
    """

    def __init__(
        self, config: Config, train: TrainArgs, out_dir: Path, settings: dict[str, Any], progress: bool | None
    ) -> None:
        self.config = config
        self.train_args = train
        self.out_dir = out_dir
        self.settings = settings
        self.tokens_per_step = train.global_batch_size * (train.max_seq_length or config.block_size)
        self.total_steps = count_steps(train, self.tokens_per_step)
        self.reporter = Reporter(self.total_steps, progress)
        self.fabric: TrainingFabric | None = None
        self.tokenizer: Tokenizer | None = None
        self.tokenizer_dir: Path | None = None
        self.resume_file: Path | bool = False
        self.lock = OutDirLock(out_dir)
        self.fused_loss: FusedLoss | None = None

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Release the terminal, the loggers and the process group whatever happens in the scope."""
        status = "failed"
        try:
            yield
            status = "success"
        finally:
            self.reporter.close()
            for logger in self.fabric.loggers if self.fabric is not None else ():
                logger.finalize(status)
            self.lock.release()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def set_matmul_precision(self, precision: str | None) -> None:
        """Choose how float32 matrix products are computed."""
        if precision is not None:
            torch.set_float32_matmul_precision(precision)

    def launch(
        self,
        devices: int | str,
        num_nodes: int,
        strategy: str,
        precision: str | None,
        logger_name: str,
        log: LogArgs,
        distributed: DistributedArgs,
    ) -> None:
        """Start the processes, or join those that a launcher has started."""
        started = started_processes(os.environ)
        if started is not None:
            devices, num_nodes = self._agree_with(started, devices, num_nodes)
        self.devices, self.num_nodes = parse_devices(devices), num_nodes
        accelerator = accelerator_here()
        cuda = accelerator == "cuda"
        made = make_strategy(strategy, self.devices * num_nodes, num_nodes, distributed, accelerator)
        precision = precision or default_precision(accelerator)
        made.use_precision(precision, accelerator)
        plugins: list[Any] = []
        if (environment := cluster_plugin(started)) is not None:
            plugins.append(environment)
        logger = _choose_logger(
            logger_name,
            self.out_dir,
            name=f"pretrain-{self.config.name}",
            resume=bool(self.settings.get("resume")),
            log_interval=self.train_args.log_interval,
            log_args=asdict(log),
        )
        self.fabric = TrainingFabric(
            show=self.reporter.show,
            devices=self.devices,
            num_nodes=num_nodes,
            strategy=made,
            precision=precision,
            loggers=[logger],
            plugins=plugins,
            callbacks=[GradientNorm(), ExpertLoad()],
        )
        if note := single_process_note(strategy, self.devices * num_nodes, distributed):
            self.fabric.print(note)
        if cuda and self.devices > 1:
            self._report_topology()
        if started is None and self.devices > 1:
            end_together()
        with _connection_errors(distributed.timeout_minutes):
            self.fabric.launch()
        if self.fabric.is_global_zero:  # who is the first is certain only now
            self.fabric.add_callback(self.reporter)
        if logger_name in ("tensorboard", "wandb", "mlflow"):
            self.fabric.logger.log_hyperparams(self.settings)

    def add_telemetry(self, peak_tflops: float | None) -> None:
        """Log what the run costs."""
        fabric = self.fabric
        peak = 1e12 * peak_tflops if peak_tflops is not None else None
        if peak is None and fabric.device.type == "cuda":
            name, precision = torch.cuda.get_device_name(fabric.device), fabric.strategy.precision.precision
            if (peak := peak_flops(name, precision, torch.get_float32_matmul_precision())) is None:
                fabric.print(f"peak_tflops: unknown for {name} in {precision}: no utilization (mfu) is logged")
        fabric.add_callback(Telemetry(fabric.device, fabric.world_size, peak))
        if shows_pictures(fabric.logger):
            fabric.add_callback(ExpertImages(self.config.name))

    def _agree_with(self, started: Processes, devices: int | str, num_nodes: int) -> tuple[int, int]:
        if devices not in ("auto", -1, started.per_node) or num_nodes not in (1, started.nodes):
            raise ValueError(
                f"devices: {devices}, num_nodes: {num_nodes}: {started.started_by} has started {started.per_node} "
                f"processes on each of {started.nodes} nodes; set devices: auto, or these numbers"
            )
        return started.per_node, started.nodes

    def _report_topology(self) -> None:
        if (matrix := topology.read_matrix()) is None:
            check_nvlink_connectivity(self.fabric)  # knows AMD's tool as well
            return
        for line in topology.report(matrix):
            self.fabric.print(line)

    def lock_out_dir(self) -> None:
        """Make sure that no other run works in the same directory, and tidy up what a killed one left there."""
        owner = self.fabric.broadcast(self.lock.take() if self.fabric.is_global_zero else None)
        if owner is not None:
            raise ValueError(
                f"out_dir: {str(self.out_dir)!r} is in use by {owner}; wait until it ends, or choose another --out_dir"
            )
        if self.fabric.is_global_zero:
            for line in checkpoints.recover(self.out_dir):
                self.fabric.print(line)
        self.fabric.barrier()

    def find_checkpoint(self, resume: Any, initial_checkpoint_dir: Path | None, eval: EvalArgs) -> None:
        """Decide what to resume from, and check that it is this model."""
        litgpt.pretrain.validate_args(self.train_args, eval, initial_checkpoint_dir, resume)
        if self.total_steps < 1:
            raise ValueError(
                f"train.max_tokens: {self.train_args.max_tokens} is less than one step of {self.tokens_per_step} "
                "tokens (train.global_batch_size times the sequence length)"
            )
        self.resume_file = agree(self.fabric, lambda: self._find_resume_file(resume, initial_checkpoint_dir))
        if self.resume_file:
            self.fabric.attempt = agree(self.fabric, lambda: next_attempt(self.out_dir, self.resume_file.parent))

    def _find_resume_file(self, resume: Any, initial_checkpoint_dir: Path | None) -> Path | bool:
        file = find_resume_file(resume, self.out_dir, self.fabric.print)
        if file:
            require_same_model("resume", file.parent, self.config)
            require_same_optimizer(file.parent, self.settings)
        if initial_checkpoint_dir is not None:
            require_same_model("initial_checkpoint_dir", initial_checkpoint_dir, self.config)
        return file

    def prepare_data(self, data: Any, tokenizer_dir: Path | None) -> None:
        """Prepare the data set, on the first process of each node before the others, and open the tokenizer."""
        if data is None:
            from litgpt.data import TinyLlama

            data = TinyLlama()
        self.data = data
        if hasattr(data, "require_vocabulary"):  # before a preparation that may take hours
            data.require_vocabulary(self.config.padded_vocab_size)
        if hasattr(data, "prepare_tokenizer") and tokenizer_dir is None:
            with self.fabric.rank_zero_first(local=True):
                tokenizer_dir = data.prepare_tokenizer()
        if tokenizer_dir is not None:
            self.tokenizer = open_tokenizer(tokenizer_dir, self.config.padded_vocab_size)
        self.tokenizer_dir = tokenizer_dir

    def add_samples(self, sample: SampleArgs) -> None:
        """Have text written after every validation."""
        if not sample.prompts:
            return
        if self.tokenizer is None:
            raise ValueError("sample.prompts: needs a tokenizer; give tokenizer_dir, or remove the prompts")
        if not self.fabric.strategy.holds_whole_model:
            self.fabric.print("No samples: under this strategy no process holds a whole model.")
            return
        from litgpt_moe_ext.training.callbacks.samples import TextSamples

        self.fabric.add_callback(TextSamples(sample, self.tokenizer))

    def require_whole_model(self, evaluate: EvaluateArgs) -> None:
        """Raise ValueError if benchmarks are wanted and no process will hold a model to run them on."""
        if evaluate.wanted and not self.fabric.strategy.holds_whole_model:
            raise ValueError(
                "evaluate: under this strategy no process holds a whole model; use strategy: ddp, or evaluate the "
                "checkpoints with `litgpt-moe hellaswag` and `litgpt evaluate`"
            )

    def add_benchmarks(self, evaluate: EvaluateArgs) -> None:
        """Have the model evaluated while it trains."""
        if not evaluate.wanted:
            return
        if self.tokenizer is None:
            raise ValueError("evaluate: needs a tokenizer; give tokenizer_dir, or remove the benchmarks")
        from litgpt_moe_ext.training.callbacks.benchmarks import make_benchmarks

        length = self.train_args.max_seq_length or self.config.block_size
        self.fabric.add_callback(make_benchmarks(evaluate, self.tokenizer, self.tokenizer_dir, length, self.fabric))

    def add_memory_savers(self, activation_checkpointing: str, fused_cross_entropy: bool) -> None:
        """Trade time for memory as asked."""
        if activation_checkpointing != "none":
            self.fabric.add_callback(ActivationCheckpointing(activation_checkpointing))
        if fused_cross_entropy and not self.fabric.strategy.holds_whole_model:
            raise ValueError("fused_cross_entropy: true needs the whole output head on every process; use ddp")
        if fused_cross_entropy:
            require_torch()
            self.fused_loss = FusedLoss()
            self.fabric.add_callback(self.fused_loss)

    def add_optimization(
        self, schedule: ScheduleArgs, groups: ParameterGroupArgs, anomaly: AnomalyArgs, ema: EmaArgs
    ) -> None:
        """Have the optimizer made and watched as asked."""
        fabric = self.fabric
        strategy = fabric.strategy
        strategy.follow(self.train_args)
        scaled = strategy.scales_gradients and not strategy.clips_in_step
        self.optimization = Optimization(schedule, groups, scaled, in_pieces=strategy.steps_in_parts)
        fabric.add_callback(self.optimization)
        fabric.add_callback(GradientGuard(anomaly, self.out_dir, fabric.global_rank, fabric.print))
        if strategy.scales_gradients:
            fabric.add_callback(strategy.loss_scale_state())
        if ema.decay is not None:
            fabric.add_callback(WeightAverage(ema))

    def train(
        self,
        seed: int,
        initial_checkpoint_dir: Path | None,
        eval: EvalArgs,
        optimizer: str | dict,
        compile: bool | str,
        checkpoint: CheckpointArgs,
    ) -> None:
        """Run LitGPT's loop to its end."""
        if (obstacle := self.fabric.strategy.compile_obstacle) is not None:
            decision = CompileDecision(False, obstacle)
        else:
            decision = decide(compile, self.config, probe_platform(self.fabric.device.type))
        if decision.enabled and self.fused_loss is not None:
            raise SettingsError("fused_cross_entropy: true cannot be compiled; set compile: false")
        self._announce(decision)
        self.fabric.add_callback(KernelReport(decision.enabled))
        continues_here = self.resume_file and self.resume_file.parent.parent.resolve() == self.out_dir.resolve()
        if self.fabric.is_global_zero and not continues_here and (aside := checkpoints.set_aside(self.out_dir)):
            self.fabric.print(f"Moved the checkpoints of an earlier run to {aside} (--resume auto continues a run)")
        loop = HookedLoop(
            self.fabric,
            self.train_args,
            self.total_steps,
            self.out_dir,
            self.tokenizer_dir,
            self.resume_file,
            self.settings,
            self.optimization,
            checkpoint.on_save_error,
            self.fused_loss,
        )
        self.retention = Retention(checkpoint, self.out_dir, self.fabric, loop.save)
        self.fabric.add_callback(self.retention)
        with loop.installed(), compile_scope(decision), _settings_errors_until_started(loop):
            litgpt.pretrain.main(
                fabric=self.fabric,
                devices=self.devices,
                num_nodes=self.num_nodes,
                seed=seed,
                initial_checkpoint_dir=initial_checkpoint_dir,
                resume=self.resume_file,
                config=self.config,
                data=self.data,
                out_dir=self.out_dir,
                tokenizer_dir=self.tokenizer_dir,
                tokenizer=self.tokenizer,
                train=self.train_args,
                eval=eval,
                optimizer=optimizer,
            )
        self.reporter.close()
        self._conclude(loop)

    def _announce(self, decision: Any) -> None:
        size = count_parameters(self.config, bool(self.train_args.tie_embeddings))
        fabric = self.fabric
        say = fabric.print
        say(
            f"{self.config.name or 'model'}: {format_count(size.total)} parameters, {format_count(size.active)} "
            f"active per token, on {fabric.world_size} x {fabric.device.type}, {fabric.strategy.precision.precision}"
        )
        say(str(decision))
        say(f"{self.total_steps} steps of {self.tokens_per_step:,} tokens, checkpoints in {self.out_dir}")
        if self.resume_file:
            say(f"Resuming from {self.resume_file.parent}")
            for note in resume_notes(self.resume_file.parent, self.settings):
                say(f"  {note}")
            if (step_of(self.resume_file.parent) or 0) >= self.total_steps:
                say("  This run is finished: nothing is left to train. --train.max_tokens with more tokens goes on.")

    def _conclude(self, loop: HookedLoop) -> None:
        per_iteration = self.tokens_per_step // self.train_args.gradient_accumulation_iters(
            self.devices, self.num_nodes
        )
        tokens = loop.trained_iterations * per_iteration
        say = self.fabric.print
        if tokens:
            duration = timedelta(seconds=round(loop.seconds))
            say(f"Trained {tokens:,} tokens in {duration} ({format_count(tokens / loop.seconds)} tok/s)")
        if self.reporter.val_loss is not None:
            unigram = getattr(self.data, "unigram_loss", None)
            baseline = "" if unigram is None else f"; a model of token frequencies alone has {unigram:.3f}"
            say(f"Validation loss {self.reporter.val_loss:.3f}{baseline}")
        best = self.out_dir / BEST
        if self.retention.best_loss is not None and best.is_dir():
            say(f"Best validation loss {self.retention.best_loss:.3f} after step {step_of(best)}: {best}")
        if self.tokenizer is not None:
            final = self.out_dir / "final"
            say(f'Try it: litgpt generate {final} --prompt "..."')
            say(f"        litgpt chat {final}")
        say(f"Go on: --resume auto --train.max_tokens {2 * self.train_args.max_tokens}")


@contextlib.contextmanager
def _connection_errors(minutes: float) -> Iterator[None]:
    try:
        yield
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(
            f"the processes could not be connected through {address} within {minutes:g} minutes "
            f"(distributed.timeout_minutes): {str(error).splitlines()[0]}. One of them may have ended; see its output."
        ) from error


@contextlib.contextmanager
def _settings_errors_until_started(loop: HookedLoop) -> Iterator[None]:
    # Before its loop starts, LitGPT makes the data loaders and loads the checkpoint; what is wrong there is an input.
    try:
        yield
    except (ValueError, OSError) as error:
        if loop.state:
            raise
        raise SettingsError(str(error)) from error


def _choose_logger(logger_name: str, out_dir: Path, **kwargs: Any) -> Any:
    if logger_name == "csv":
        # LitGPT's flushes by a step number that is an iteration; here every line that is printed is also on file.
        return CSVLogger(root_dir=out_dir / "logs", name="csv", flush_logs_every_n_steps=1)
    return choose_logger(logger_name, out_dir, **kwargs)
