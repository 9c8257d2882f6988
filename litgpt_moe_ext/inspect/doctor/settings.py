"""Checks that a run would make of its settings and its start before training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.doctor.finding import Finding
from litgpt_moe_ext.inspect.doctor.run_here import compiles, holds_whole_model, processes
from litgpt_moe_ext.inspect.recipes import Recipe

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.training.phases.plan import Plan
    from litgpt_moe_ext.training.settings import Settings


def unread(checkpoint: Path) -> Finding:
    """Return why a checkpoint's settings are not checked."""
    file = checkpoint / "hyperparameters.yaml"
    return Finding("settings", "note", f"those of a checkpoint are not checked; `doctor {file}` checks them")


def settings_together(recipe: Recipe, reading: "AbstractContextManager[Settings]") -> Iterator[Finding]:
    """Yield what a run would report about the settings.

    Args:
        recipe: The recipe.
        reading: Yields the settings as a run reads them; its errors, and those within its scope, are the run's.
    """
    from litgpt_moe_ext.config.notes import model_notes

    try:
        with reading as settings:
            plan = _checked(recipe, settings)
    except SettingsError as error:
        yield Finding("settings", "problem", str(error))
        return
    yield Finding("settings", "good", "consistent")
    yield from (Finding("model", "note", note) for note in model_notes(cast("Config", plan.config)))
    yield from _start(plan)


def _checked(recipe: Recipe, settings: "Settings") -> "Plan":
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here
    from litgpt_moe_ext.training.phases.checks import check_batch, check_whole_model
    from litgpt_moe_ext.training.phases.inputs import check_data, offers
    from litgpt_moe_ext.training.phases.plan import check_plan

    plan = check_plan(settings)
    train = recipe.settings.train
    check_batch(train.global_batch_size, train.micro_batch_size, processes(recipe) * recipe.settings.num_nodes)
    check_whole_model(plan.settings, holds_whole_model(recipe), compiles(recipe, accelerator_here()))
    check_data(plan.settings, plan.config)
    data: Any = plan.settings.data
    plan.tell_length(data)
    if offers(data, "check_shards") and data.data_path.is_dir():
        data.connect(max_seq_length=recipe.sequence_length)
        data.check_shards()
    source = getattr(data, "source_path", None)
    if offers(data, "check_sources") and (source is None or source.exists()):  # otherwise the check of data reports it
        data.check_sources()
    return plan


def _start(plan: "Plan") -> Iterator[Finding]:
    from litgpt_moe_ext.training.phases.start import choose_checkpoint

    initial = plan.settings.initial_checkpoint_dir
    if plan.settings.resume is False and initial is None:
        return
    passed_over: list[str] = []
    try:
        found = choose_checkpoint(plan, passed_over.append, read_all=False)
    except (OSError, SettingsError) as error:
        yield Finding("start", "problem", str(error))
        return
    yield from (Finding("start", "note", line) for line in passed_over)
    state = "complete; its checksums are checked when the run starts"
    if found is not None:
        yield Finding("start", "good", f"resumes from {found.parent}: {state}")
    elif initial is not None:
        yield Finding("start", "good", f"from the weights in {initial}: {state}")
    else:
        yield Finding("start", "good", f"from scratch: nothing to resume in {plan.out_dir}")
