"""Checks that settings go together, made before any long work starts. None of them needs lightning."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from litgpt_moe_ext.config.litgpt_fields import RANGES, check_ranges
from litgpt_moe_ext.errors import SettingsError, refuse_first
from litgpt_moe_ext.recipe_files import class_path_of
from litgpt_moe_ext.training.optim.arguments import learning_rate_of, obstacle_on_shards
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.phases.inputs import offers

if TYPE_CHECKING:
    from litgpt.config import Config

    from litgpt_moe_ext.training.settings import DistributedArgs, ScheduleName, Settings

# DeepSpeed gives the optimizer flat shards of several weights. These optimizers are elementwise; one that looks at
# rows, matrices or whole weights would silently compute something else.
_ELEMENTWISE_OPTIMIZERS = (
    *("torch.optim." + name for name in ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")),
    "deepspeed.ops.adam.DeepSpeedCPUAdam",
    "deepspeed.ops.adam.FusedAdam",
    "deepspeed.ops.lion.DeepSpeedCPULion",
    "deepspeed.ops.lion.FusedLion",
)
_COMMON_OPTIONS = ("timeout_minutes",)
# What each logger imports, any of them.
_LOGGER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "litlogger": ("litlogger",),
}


def check_settings(settings: Settings, config: Config) -> None:
    """Raise SettingsError unless the settings of a run go together; needs neither processes nor data."""
    check_model(config)
    refuse_first(_training(settings, config))
    refuse_first(_logger(settings.logger_name))
    check_combination(settings)


def check_model(config: Config) -> None:
    """Raise SettingsError if a number in a model's configuration is out of range."""
    check_ranges({name: getattr(config, name) for name in RANGES}, "model_config.")


def check_combination(settings: Settings) -> None:
    """Raise SettingsError if a setting of a run cannot be combined with its strategy."""
    refuse_first(_ddp(settings))
    if (stage := facts_of(settings.strategy).zero_stage) is not None:
        refuse_first(_zero(settings, stage))


def check_strategy(name: str, args: DistributedArgs, accelerator: str) -> None:
    """Raise SettingsError if a strategy does not work here, lacks an option that is set, or needs a missing package.

    Args:
        name: Name of the strategy, as in recipes.
        args: Its options.
        accelerator: Device type.
    """
    facts = facts_of(name)
    for option, value in dataclasses.asdict(args).items():
        if value is not None and option not in (*_COMMON_OPTIONS, *facts.options):
            own = ", ".join(f"distributed.{option}" for option in facts.options)
            raise SettingsError(
                f"distributed.{option}: {value} would be ignored because strategy: {name} has no such setting; leave "
                f"it out, or use what it has: {own}"
            )
    if facts.cuda_only and accelerator != "cuda":
        raise SettingsError(
            f"strategy: {name!r} needs CUDA devices, and there is none; ddp and fsdp2 also work on CPUs"
        )
    if facts.requires is not None:
        _check_installed(f"strategy: {name!r}", facts.requires)


def _check_installed(what: str, requirement: str) -> None:
    from packaging.requirements import Requirement

    needed = Requirement(requirement)
    try:
        installed = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        problem = "which is not installed"
    else:
        if needed.specifier.contains(installed, prereleases=True):
            return
        problem = f"and {installed} is installed"
    raise SettingsError(f"{what} needs {requirement}, {problem}; `uv sync --extra {needed.name}` installs it")


def _logger(name: str) -> Iterator[str]:
    packages = _LOGGER_PACKAGES.get(name, ())
    if packages and not any(package in sys.modules or importlib.util.find_spec(package) for package in packages):
        yield (
            f"logger_name: {name!r} needs the package {packages[0]}, which is not installed; `uv pip install "
            f"{packages[0]}` installs it, or set csv"
        )


def check_batch(global_batch_size: int, micro_batch_size: int, processes: int) -> None:
    """Raise SettingsError unless the global batch splits into whole micro-batches on every process."""
    unit = micro_batch_size * processes
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
        nearest = f"{below} or {above}" if below else str(above)
        share, rest = divmod(global_batch_size, processes)
        # A smaller micro-batch gives the same training.
        fitting = 0 if rest else next(size for size in range(min(share, micro_batch_size), 0, -1) if share % size == 0)
        smaller = f", or set train.micro_batch_size to {fitting}" if fitting else ""
        raise SettingsError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of train.micro_batch_size "
            f"({micro_batch_size}) times the number of processes ({processes}); the nearest that are: {nearest}"
            f"{smaller}"
        )


def check_length(length: int, block_size: int) -> None:
    """Raise SettingsError if sequences are longer than the model's context."""
    refuse_first(_too_long(length, block_size))


def _too_long(length: int, block_size: int) -> Iterator[str]:
    if length > block_size:
        yield f"train.max_seq_length: {length} must be from 1 to the model's block_size: {block_size}"


def _training(settings: Settings, config: Config) -> Iterator[str]:
    train, block_size = settings.train, config.block_size
    length = train.max_seq_length or block_size
    yield from _too_long(length, block_size)
    step = train.global_batch_size * length
    if train.epochs is None and train.max_tokens < step:
        yield (
            f"train.max_tokens: {train.max_tokens} must be at least one step of {step} tokens "
            "(train.global_batch_size times the sequence length)"
        )
    if train.epochs is not None and offers(settings.data, "plan_run"):
        yield (
            f"train.epochs: {train.epochs} must be null for a mixture, whose corpora have epochs of their own; give "
            "train.max_tokens"
        )
    if settings.fused_cross_entropy and config.final_logit_softcapping is not None:
        yield (
            "fused_cross_entropy: true cannot be combined with model_config.final_logit_softcapping: "
            f"{config.final_logit_softcapping}; set it to false"
        )
    peak_rate(settings, settings.schedule.name)


def peak_rate(settings: Settings, schedule: ScheduleName) -> float:
    """Return the optimizer's learning rate, from which a schedule falls to `train.min_lr`.

    Raises:
        SettingsError: If the optimizer cannot be made, or its learning rate is below `train.min_lr`.
    """
    peak, floor = learning_rate_of(settings.optimizer), settings.train.min_lr
    if schedule != "constant" and floor > peak:
        raise SettingsError(
            f"train.min_lr: {floor} must be at most the optimizer's learning rate, {peak}, as the schedule falls "
            "to it; set --optimizer.lr or --train.min_lr"
        )
    return peak


def _ddp(settings: Settings) -> Iterator[str]:
    if not settings.distributed.find_unused_parameters:
        return
    conflict = "distributed.find_unused_parameters: true cannot be combined with"
    if settings.fused_cross_entropy:
        yield (
            f"{conflict} fused_cross_entropy: true, whose output head works outside the forward pass, where ddp takes "
            "it for unused; set one of them to false"
        )
    if settings.cuda_graphs is True:
        yield f"{conflict} cuda_graphs: true, where ddp takes all weights for unused; set one of them to false"


def _zero(settings: Settings, stage: int) -> Iterator[str]:
    where = f"cannot be combined with strategy: {settings.strategy!r}"
    if settings.precision == "bf16-true":
        yield (
            f"precision: 'bf16-true' {where}, whose optimizer always keeps float32 weights; use bf16-mixed, which "
            "keeps bfloat16 ones for everything else"
        )
    path = class_path_of(settings.optimizer)
    if _full_path(path) not in _ELEMENTWISE_OPTIMIZERS:
        yield (
            f"optimizer: {path!r} {where}, which hands it flat shards of several weights; use one that treats every "
            f"number by itself: {', '.join(_ELEMENTWISE_OPTIMIZERS)}"
        )
    if settings.compile is True:
        yield f"compile: true {where}; leave it at auto, or use fsdp2"
    if stage == 3 and settings.activation_checkpointing == "selective":
        yield (
            f"activation_checkpointing: 'selective' {where}, which gives weights back between the forward pass and its "
            "repetition; use full, or stage 2"
        )
    if settings.anomaly.spike_factor is not None:
        yield (
            f"anomaly.spike_factor: {settings.anomaly.spike_factor} {where}, which computes the gradient norm inside "
            "the optimizer step; use null, or ddp or fsdp2. Gradients that are not finite are watched over here as well"
        )
    if settings.ema.decay is not None:
        yield f"ema.decay: {settings.ema.decay} {where}; use null, or ddp or fsdp2"


def _full_path(optimizer: str) -> str:
    # torch's optimizers can also be named by their submodule, such as torch.optim.adam.Adam.
    module, _, name = optimizer.rpartition(".")
    return f"torch.optim.{name}" if module in ("", f"torch.optim.{name.lower()}") else optimizer


def strategy_note(name: str, processes: int, args: DistributedArgs, accelerator: str) -> str | None:
    """Return a note about a working strategy that does not do what its name says, or has a hidden cost; else None.

    Args:
        name: Name of the strategy, as in recipes.
        processes: Number of processes on all nodes.
        args: Its options.
        accelerator: Device type.
    """
    facts = facts_of(name)
    if processes == 1 and not facts.alone and facts.shards:
        offload = ", and distributed.cpu_offload has no effect" if args.cpu_offload else ""
        return f"strategy: {name} has nothing to shard in a single process: it becomes auto{offload}"
    if args.cpu_offload and accelerator == "cpu":
        return "distributed.cpu_offload: true has no effect without GPUs: everything is in CPU memory already"
    if "weights" in facts.shards and facts.zero_stage is None:
        from packaging.version import Version

        installed = importlib.metadata.version("torch")
        if Version(installed) < Version("2.12"):
            return (
                f"strategy: {name} with torch {installed} keeps half a KB of the host's memory for every weight tensor "
                "and step, on each process (pytorch/pytorch#188174): 15 GB in 100,000 steps with 300 of them; torch "
                "2.12 does not"
            )
    return None


def check_whole_model(settings: Settings, whole: bool, compiled: bool) -> None:
    """Raise SettingsError if a setting needs a whole or an uncompiled model, and the run's is not.

    Args:
        settings: The settings of the run.
        whole: Whether every process has all weights.
        compiled: Whether the model is compiled.
    """
    if settings.evaluate.wanted and not whole:
        raise SettingsError(
            f"evaluate: no process holds a whole model under strategy: {settings.strategy}; use ddp, or evaluate the "
            "checkpoints with `litgpt-moe hellaswag` and `litgpt evaluate`"
        )
    if settings.fused_cross_entropy and not whole:
        raise SettingsError(
            "fused_cross_entropy: true needs the whole output head on every process, but strategy: "
            f"{settings.strategy} shards it; use ddp, or set it to false"
        )
    if settings.fused_cross_entropy and compiled:
        raise SettingsError("fused_cross_entropy: true cannot be compiled; set compile: false")
    in_flat_shards = facts_of(settings.strategy).zero_stage is not None
    if not (whole or in_flat_shards) and (reason := obstacle_on_shards(settings.optimizer)) is not None:
        raise SettingsError(
            f"optimizer: {settings.optimizer!r} cannot be combined with strategy: {settings.strategy}: it {reason}"
        )
