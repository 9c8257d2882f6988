"""Epochs: their length in steps, the epoch of each step, and a checkpoint at the end of each epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.steps.batches import unwrapped
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.plan import Plan
    from litgpt_moe_ext.training.phases.prepare import Prepared


def with_epochs(launched: Launched, prepared: Prepared) -> Launched:
    """Return the run with `train.max_tokens` computed from `train.epochs`, if the latter is set.

    Opens the data, as LitGPT's loop will do again; every process must call this.

    Raises:
        SettingsError: If the length of an epoch is unknown, or all epochs together are shorter than a step.
    """
    plan = launched.plan
    epochs = plan.settings.train.epochs
    if epochs is None:
        return launched
    data: Any = prepared.data
    data.connect(
        tokenizer=prepared.tokenizer, batch_size=plan.train.micro_batch_size, max_seq_length=plan.sequence_length
    )
    with launched.fabric.rank_zero_first(local=True):
        data.prepare_data()
    data.setup()
    micro_batches = epoch_of(data.train_dataloader(), f"train.epochs: {epochs}", "train.max_tokens")
    steps = epochs * micro_batches // launched.accumulation
    if not steps:
        raise SettingsError(
            f"train.epochs: {epochs} of this data is less than one step of {plan.train.global_batch_size} sequences; "
            "set more epochs, or a smaller train.global_batch_size"
        )
    planned = with_tokens(plan, steps * plan.tokens_per_step)
    launched.reporter.total_steps = planned.total_steps
    launched.fabric.print(
        f"train.epochs: {epochs} means {counted(steps, 'step')}, train.max_tokens: {planned.settings.train.max_tokens}"
    )
    return dataclasses.replace(launched, plan=planned)


def epoch_of(loader: Any, setting: str, instead: str) -> int:
    """Return the number of micro-batches of an epoch on each process.

    Args:
        loader: The training loader.
        setting: What needs the length of an epoch, and its value.
        instead: What to set instead.

    Raises:
        SettingsError: If the loader does not know it.
    """
    try:
        return len(loader)
    except TypeError as error:
        raise SettingsError(
            f"{setting} needs data that says how long an epoch is; set it to null and give {instead}"
        ) from error


def with_tokens(plan: Plan, max_tokens: int) -> Plan:
    """Return a plan for another number of tokens."""
    settings = dataclasses.replace(plan.settings, train=dataclasses.replace(plan.settings.train, max_tokens=max_tokens))
    train = dataclasses.replace(plan.train, max_tokens=max_tokens)
    plain = {**plan.plain, "train": {**plan.plain["train"], "max_tokens": max_tokens}}
    return dataclasses.replace(plan, settings=settings, train=train, plain=plain)


class Epochs(Callback):
    """Logs the epoch, which LitGPT counts anew after every resume, and saves at the end of each.

    Args:
        save: Saves the step unless already saved, on every process; None for no checkpoints.
    """

    def __init__(self, save: Callable[[], Any] | None) -> None:
        self._save = save
        self._epoch: int | None = None

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Save if the last step ended an epoch."""
        epoch = getattr(unwrapped(state["train_dataloader"]), "epoch", None)
        ended, self._epoch = self._epoch is not None and epoch != self._epoch, epoch
        if self._save is None:
            return
        if epoch is None:
            raise SettingsError("checkpoint.every_epoch: true needs data that counts its epochs; set it to false")
        if ended:
            self._save()

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the epoch in which the last step began."""
        if {"loss", "val_loss"} & metrics.keys() and self._epoch is not None:
            metrics["epoch"] = self._epoch
