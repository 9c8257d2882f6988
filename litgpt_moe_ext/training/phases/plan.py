"""The first phase of a run: its settings, checked as far as possible without other processes or data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.config import Config

from litgpt_moe_ext.data.mixture.settings import RunLength
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.checkpoint.compatibility import require_same_model
from litgpt_moe_ext.training.checkpoint.exports import check_exports
from litgpt_moe_ext.training.checkpoint.hyperparameters import to_plain
from litgpt_moe_ext.training.checkpoint.progress import newest_first
from litgpt_moe_ext.training.optim.arguments import with_module
from litgpt_moe_ext.training.optim.schedules import count_steps
from litgpt_moe_ext.training.phases.checks import check_settings
from litgpt_moe_ext.training.phases.inputs import check_initial_checkpoint, check_writable, offers
from litgpt_moe_ext.training.settings.model import model_of
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    import litgpt.args

    from litgpt_moe_ext.training.settings import Settings


@dataclass(frozen=True)
class Plan:
    """The checked settings of a run, and what follows from them.

    Attributes:
        settings: All settings; checkpoint directories are resolved as in LitGPT.
        config: The model's configuration.
        train: `settings.train` as LitGPT's own class.
        plain: The settings as plain data, for checkpoints and loggers.
        steps_ahead: Optimizer steps that a resumed training has made, minus the steps that its tokens would take at the
            present batch size; negative if the batch was larger before.
    """

    settings: Settings
    config: Config
    train: litgpt.args.TrainArgs
    plain: dict[str, Any]
    steps_ahead: int = 0

    @property
    def out_dir(self) -> Path:
        """Directory of checkpoints and logs."""
        return self.settings.out_dir

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.train.max_seq_length or self.config.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.train.global_batch_size * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return count_steps(self.train, self.tokens_per_step, self.steps_ahead)

    def tell_length(self, data: Any) -> None:
        """Tell a data module how long the run is, if its rows depend on that.

        Args:
            data: The data module.

        Raises:
            SettingsError: If the data need another length, or longer validations.
        """
        if offers(data, "plan_run"):
            scheduled = count_steps(dataclasses.replace(self.train, max_steps=None), self.tokens_per_step)
            steps = self.total_steps - self.steps_ahead
            data.plan_run(RunLength(steps, self.train.global_batch_size, self.settings.eval.max_iters, scheduled))


def make_plan(settings: Settings) -> Plan:
    """Check the settings, create `out_dir`, and return the plan.

    Raises:
        SettingsError: If a setting or an input is wrong.
    """
    plan = check_plan(settings)
    check_writable(plan.out_dir)
    return plan


def check_plan(settings: Settings) -> Plan:
    """Return the plan after all checks that need neither processes nor data; for runs, studies and `doctor`.

    Writes nothing.

    Raises:
        SettingsError: If a setting or an input is wrong.
    """
    settings = _resolved(settings)
    plan = Plan(settings, model_of(settings), settings.train.for_litgpt(), plain_settings(settings))
    check_settings(settings, plan.config)
    goes_on = settings.resume == "auto" and newest_first(plan.out_dir)
    if settings.initial_checkpoint_dir is not None and not goes_on:
        check_initial_checkpoint(settings.initial_checkpoint_dir)
        require_same_model("initial_checkpoint_dir", settings.initial_checkpoint_dir, plan.config)
    if settings.tokenizer_dir is not None and not settings.tokenizer_dir.is_dir():
        raise SettingsError(
            f"tokenizer_dir: {quoted(settings.tokenizer_dir)} must be a directory with a tokenizer; it does not exist"
        )
    if settings.evaluate.wanted:
        from litgpt_moe_ext.training.callbacks.benchmarks import check_benchmarks

        check_benchmarks(settings.evaluate)
    check_exports(plan)
    return plan


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain data for a recipe, without those that are null."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: to_plain(value, name) for name, value in values.items() if value is not None}


def _resolved(settings: Settings) -> Settings:
    data = settings.data
    if settings.wandb_dataset is not None:
        from litgpt_moe_ext.data import WandbCorpus

        data = WandbCorpus.instead_of(data, settings.wandb_dataset, settings.wandb_artifacts_dir)
    elif settings.wandb_artifacts_dir is not None:
        raise SettingsError(
            f"wandb_artifacts_dir: {quoted(settings.wandb_artifacts_dir)} has no effect without wandb_dataset; leave "
            "it out, or name the artifact"
        )
    return dataclasses.replace(
        settings,
        optimizer=with_module(settings.optimizer),
        initial_checkpoint_dir=_checkpoint_dir(settings.initial_checkpoint_dir),
        tokenizer_dir=_checkpoint_dir(settings.tokenizer_dir),
        data=data,
    )


def _checkpoint_dir(directory: Path | None) -> Path | None:
    # LitGPT keeps its downloads in checkpoints/, a prefix that its commands let users omit.
    if directory is None or directory.is_dir():
        return directory
    from litgpt.utils import extend_checkpoint_dir

    return extend_checkpoint_dir(directory)
