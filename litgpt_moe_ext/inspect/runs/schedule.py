"""The planned learning rates of a training."""

import dataclasses
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt, checked
from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.pictures.style import STYLE, begin_at_zero
from litgpt_moe_ext.training.optim.schedules import Schedule, count_steps, schedule_steps
from litgpt_moe_ext.training.phases.checks import check_batch, peak_rate
from litgpt_moe_ext.training.settings import Settings
from litgpt_moe_ext.training.settings.loop import ScheduleName

_STYLES = ("-", "--", "-.", ":")

# A minute of stepping the scheduler. LitGPT's default of 3e12 tokens would be a hundred million small steps.
_MOST_STEPS = 10_000_000


def planned_rates(settings: Settings, name: ScheduleName) -> list[float]:
    """Return the learning rate of every optimizer step of a training, from the code that the training runs.

    Args:
        settings: Settings of the run.
        name: Name of the schedule, instead of the recipe's.

    Raises:
        SettingsError: If the training has no step or too many to list, or needs its data to know the length of the
            warm-up.
    """
    train = settings.train
    check_batch(train.global_batch_size, train.micro_batch_size, processes=1)
    if train.epochs is not None:
        raise SettingsError(
            f"train.epochs: {train.epochs} depend on the data's length, which is not known here; set it to null and "
            "give train.max_tokens"
        )
    if train.lr_warmup_fraction:
        raise SettingsError(
            f"train.lr_warmup_fraction: {train.lr_warmup_fraction} is a part of the data's length, which is not known "
            "here; give train.lr_warmup_steps"
        )
    tokens_per_step = train.global_batch_size * (train.max_seq_length or _block_size(settings))
    steps = count_steps(train, tokens_per_step)
    if steps < 1:
        raise SettingsError(
            f"train.max_tokens: {train.max_tokens} must be at least {tokens_per_step}, the tokens of one step"
        )
    if steps > _MOST_STEPS:
        raise SettingsError(
            f"train.max_tokens: {train.max_tokens} are {steps:,} steps of {tokens_per_step} tokens, of which at most "
            f"{_MOST_STEPS:,} are drawn; set it to what the run is to train on, or give train.max_steps"
        )
    # As LitGPT counts in one process, which this need not import for it.
    accumulation = train.global_batch_size // train.micro_batch_size
    max_iters = train.max_tokens // (tokens_per_step // accumulation)
    warmup_iters = min(max_iters, (train.lr_warmup_steps or 0) * accumulation)
    args = dataclasses.replace(settings.schedule, name=name)
    with without_compiler():
        peak = peak_rate(settings, name)
        schedule = Schedule(args, peak, train.min_lr, *schedule_steps(warmup_iters, max_iters, accumulation))
        return [schedule.rate(step) for step in range(steps)]


def schedule_figure(rates: Mapping[str, Sequence[float]]) -> Figure:
    """Draw learning rates over optimizer steps, a line for each schedule by name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(rates.items()):
            # Different line styles, as curves may mostly overlap.
            axes.plot(range(1, len(values) + 1), values, _STYLES[i % len(_STYLES)], linewidth=1.3, label=name)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("learning rate")
        begin_at_zero(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.grid(alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside right center")
    return figure


def _block_size(settings: Settings) -> int:
    if settings.model_config is not None:
        return checked("model_config.block_size", settings.model_config.block_size, PositiveInt)
    from litgpt_moe_ext.training.settings.model import model_of

    return model_of(settings).block_size
