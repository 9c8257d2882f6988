"""The second phase of a run: connecting its processes and locking `out_dir`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from litgpt.utils import check_nvlink_connectivity, choose_logger, parse_devices

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.interruption import end_at_once_on_termination, ending_at_once
from litgpt_moe_ext.kernels.gpu import defect
from litgpt_moe_ext.software import software
from litgpt_moe_ext.terminal import redraws
from litgpt_moe_ext.tokens.padding import accept_padding, accepts_padding
from litgpt_moe_ext.training.callbacks.progress import Reporter
from litgpt_moe_ext.training.checkpoint import store as checkpoints
from litgpt_moe_ext.training.control import Deadline
from litgpt_moe_ext.training.fabric import TrainingFabric
from litgpt_moe_ext.training.logs import TRANSCRIPT_FILE, wandb_run
from litgpt_moe_ext.training.logs.metrics import MetricsTables
from litgpt_moe_ext.training.parallel import topology
from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision
from litgpt_moe_ext.training.parallel.peers import explaining_lost_peers
from litgpt_moe_ext.training.parallel.processes import Processes, cluster_plugins, end_together, started_processes
from litgpt_moe_ext.training.parallel.sameness import require_same
from litgpt_moe_ext.training.parallel.strategies import make_strategy
from litgpt_moe_ext.training.phases.checks import check_batch, strategy_note
from litgpt_moe_ext.wording import counted, quoted

if TYPE_CHECKING:
    from lightning.fabric.loggers import Logger

    from litgpt_moe_ext.training.phases.plan import Plan
    from litgpt_moe_ext.training.settings import Settings


@dataclass(frozen=True)
class Launched:
    """A run whose processes are connected.

    Attributes:
        plan: The plan of the run.
        fabric: Connects the processes.
        reporter: Shows progress on the first process.
        devices: Processes on each node.
        num_nodes: Number of nodes.
    """

    plan: Plan
    fabric: TrainingFabric
    reporter: Reporter
    devices: int
    num_nodes: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.plan.train.gradient_accumulation_iters(self.devices, self.num_nodes)


@contextlib.contextmanager
def launch(plan: Plan) -> Iterator[Launched]:
    """Connect the processes and lock `out_dir`; release everything at the end of the scope.

    The logger starts after the lock is taken, so that a refused run leaves no logs behind.

    Raises:
        SettingsError: If the processes cannot work together, or another run works in `out_dir`.
        TrainingStopped: If another process ends or does not answer, in the scope too.
    """
    settings = plan.settings
    # Output to a file has lines and no bar, whatever the setting.
    bar = settings.progress is not False and redraws(sys.stdout)
    reporter = Reporter(plan.total_steps, bar, Deadline(plan.train.max_time))
    lock = ProcessLock(plan.out_dir / ".lock")
    with contextlib.ExitStack() as stack:
        if settings.float32_matmul_precision is not None:
            with contextlib.suppress(RuntimeError):  # raised if the program also used torch's newer settings
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(settings.float32_matmul_precision)
        # A data module that pads switches this on for the whole process; switch it back at the end.
        stack.callback(accept_padding, accepts_padding())
        stack.enter_context(reporter.transcript.recording())
        stack.callback(reporter.transcript.close)
        stack.callback(_disconnect)
        launched = _connect(plan, reporter)
        stack.callback(lock.release)
        with explaining_lost_peers(launched):
            if launched.fabric.world_size > 1:
                require_same(launched.fabric, plan.plain, software())
            _take(lock, launched)
        if settings.logger_name != "csv":
            earlier = _run_of_wandb()
            logger = _make_logger(launched)
            stack.push(lambda kind, *_: _finish(logger, plan, "success" if kind is None else "failed", earlier))
            launched.fabric.add_logger(logger)
            if settings.logger_name == "wandb" and launched.fabric.is_global_zero:
                launched.fabric.add_callback(wandb_run.WandbRun(logger))
        if launched.fabric.is_global_zero:
            # Before the reporter: a step that has been shown is in the tables, even if the run is killed then.
            wide = settings.logger_name == "csv"
            launched.fabric.add_callback(MetricsTables(plan.out_dir, plan.tokens_per_step, wide, launched.fabric))
            launched.fabric.add_callback(reporter)
        stack.push(lambda _kind, error, _trace: reporter.close(launched.fabric.step, error))
        with explaining_lost_peers(launched):
            yield launched


def _connect(plan: Plan, reporter: Reporter) -> Launched:
    settings, options = plan.settings, plan.settings.distributed
    started, accelerator = started_processes(os.environ, settings.num_nodes), accelerator_here()
    devices, num_nodes = _size(settings, started)
    processes = devices * num_nodes
    check_batch(plan.train.global_batch_size, plan.train.micro_batch_size, processes)
    if started is None and processes > 1:
        _refuse_to_start_here(processes)
    strategy = make_strategy(settings.strategy, processes, num_nodes, options, accelerator)
    precision: Any = settings.precision or default_precision(accelerator)
    strategy.use_precision(precision, accelerator)
    fabric = TrainingFabric(
        show=reporter.show,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        plugins=cluster_plugins(started),
    )
    if note := strategy_note(settings.strategy, processes, options, accelerator):
        fabric.print(note)
    if accelerator == "cpu" and torch.backends.mps.is_available():
        fabric.print("This Mac's GPU (MPS) is not used: nothing here was ever run on one. Training uses the CPU.")
    if accelerator == "cuda" and devices > 1:
        _report_topology(fabric)
    if processes > 1:
        end_together(started)
        end_at_once_on_termination()
    # To wait for the others is native code, which Ctrl-C does not reach.
    with _connection_errors(options.timeout_minutes), ending_at_once():
        fabric.launch()
    if (reason := defect(fabric.device)) is not None:
        raise SettingsError(
            f"devices: '{fabric.device}' does not work here ({reason}); `litgpt-moe doctor` says more, and "
            "CUDA_VISIBLE_DEVICES can hide a GPU, so that a run uses others, or the CPU"
        )
    return Launched(plan, fabric, reporter, devices, num_nodes)


def _size(settings: Settings, started: Processes | None) -> tuple[int, int]:
    """Return the number of processes on each node and the number of nodes."""
    devices, num_nodes = settings.devices, settings.num_nodes
    if started is None:
        return parse_devices(devices), num_nodes
    if devices not in ("auto", -1, started.per_node) or num_nodes not in (1, started.nodes):
        raise SettingsError(
            f"devices: {devices}, num_nodes: {num_nodes}: {started.started_by} has started "
            f"{counted(started.per_node, 'process')} on each of {counted(started.nodes, 'node')}; set devices: "
            "auto, or these numbers"
        )
    return parse_devices(started.per_node), started.nodes


def _refuse_to_start_here(processes: int) -> None:
    # Fabric starts the others as this one was started: by its file, or its module.
    main = sys.modules["__main__"]
    by_file = getattr(main, "__spec__", None) is None
    if hasattr(sys, "ps1"):
        problem = "a notebook or an interactive Python"
    elif by_file and not os.path.isfile(sys.argv[0]):
        problem = "a program that is no file, as of `python -c`"
    else:
        return
    raise SettingsError(
        f"devices: {counted(processes, 'process')} cannot be started from {problem}; train with `litgpt-moe train` in "
        "a terminal (in a notebook: !litgpt-moe train), or set devices: 1"
    )


def _take(lock: ProcessLock, launched: Launched) -> None:
    # Make sure that no other run works in the directory, and clean up after a killed one.
    fabric, out_dir = launched.fabric, launched.plan.out_dir
    owner = fabric.broadcast(lock.take() if fabric.is_global_zero else None)
    if owner is not None:
        raise SettingsError(
            f"out_dir: {quoted(out_dir)} is in use by {owner}; wait until it ends, or choose another --out_dir"
        )
    if fabric.is_global_zero:
        for line in checkpoints.recover(out_dir):
            fabric.print(line)
    fabric.barrier()


def _make_logger(launched: Launched) -> Logger:
    plan, fabric = launched.plan, launched.fabric
    settings, name = plan.settings, plan.settings.logger_name
    # To capture the terminal, litlogger would start the command again, in the middle of this run.
    log_args = asdict(settings.log) | {"save_logs": False}
    try:
        own = wandb_run.options(settings.resume, plan.out_dir) if name == "wandb" and fabric.is_global_zero else {}
        logger = choose_logger(
            name,
            plan.out_dir,
            name=f"pretrain-{plan.config.name}",
            **own,
            log_interval=plan.train.log_interval,
            log_args=log_args,
        )
        # Also opens the run at the service, so that a refusal shows now. litlogger shows log.metadata instead.
        logger.log_hyperparams({} if name == "litlogger" else plan.plain)
    except ImportError as error:
        raise SettingsError(f"logger_name: {name!r} needs a package: {error}") from error
    except Exception as error:  # every service has its own errors
        reason = one_line(error).rstrip(".")
        offline = ", set WANDB_MODE=offline" if name == "wandb" else ""
        raise SettingsError(f"logger_name: {name!r} cannot start: {reason}; mend that{offline}, or set csv") from error
    return logger


def _run_of_wandb() -> Any:
    """Return the W&B run that is open in this process, or None."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _finish(logger: Logger, plan: Plan, status: str, earlier: Any) -> None:
    try:
        if plan.settings.logger_name == "litlogger" and plan.settings.log.save_logs:
            cast(Any, logger).log_file(str(plan.out_dir / TRANSCRIPT_FILE))
        logger.finalize(status)
        if plan.settings.logger_name == "wandb" and (run := _run_of_wandb()) is not earlier:
            # Lightning leaves it open, and would log this process's next training to it.
            run.finish(exit_code=int(status != "success"))
    except Exception as error:  # every service has its own errors, and the training has ended
        print(f"  the logger failed: {one_line(error)}")


def _report_topology(fabric: TrainingFabric) -> None:
    if (matrix := topology.read_matrix()) is None:
        check_nvlink_connectivity(fabric)  # also handles AMD GPUs
        return
    for line in topology.report(matrix):
        fabric.print(line)


@contextlib.contextmanager
def _connection_errors(minutes: float) -> Iterator[None]:
    try:
        yield
    except torch.distributed.DistError as error:
        port = os.environ.get("MASTER_PORT")
        address = f"{os.environ.get('MASTER_ADDR')}:{port}"
        if "EADDRINUSE" in str(error):
            raise SettingsError(
                f"environment: MASTER_PORT: {port} is taken, by another program or by a second process of rank 0; "
                "set another port, the same for all processes"
            ) from error
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingsError(
            f"the processes could not be connected through {address} within {minutes:g} minutes "
            f"(distributed.timeout_minutes): {reason}. One of them may have ended; see its output."
        ) from error


def _disconnect() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
