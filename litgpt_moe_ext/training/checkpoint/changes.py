"""Settings of a resumed run that differ from its checkpoint's, and their effect."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from litgpt_moe_ext.training.checkpoint.hyperparameters import FILE_NAME, read
from litgpt_moe_ext.training.settings import ParameterGroupArgs, Settings

# Settings whose change has an effect that may surprise in a resumed run.
_EFFECTS = {
    "seed": "it has no effect: weights and random generators are those of the checkpoint",
    "train.global_batch_size": (
        "from here on a step has another number of tokens; the learning rate goes on after as many tokens as before"
    ),
    "train.max_tokens": "the learning rate goes on in the schedule of the new length",
    "schedule.name": "the learning rate goes on in the new schedule, at the step of the checkpoint",
}
# Settings of a single start, which may differ when the run is resumed.
_OF_THE_START = {"resume", "out_dir", "progress", "initial_checkpoint_dir"}


def resume_notes(checkpoint_dir: Path, settings: dict[str, Any]) -> list[str]:
    """Return a line for every setting that differs from the checkpoint's and whose effect may surprise.

    Args:
        checkpoint_dir: The checkpoint to resume from.
        settings: Settings of the present run, as plain data.
    """
    saved = read(checkpoint_dir)
    if not saved:
        return [f"{checkpoint_dir} has no readable {FILE_NAME}: changed settings go unnoticed"]
    notes = [
        f"{name} was {before} in the checkpoint and is {now} now: {effect}"
        for name, before, now in _differences(saved, settings)
        if (effect := _effect_of(name)) is not None
    ]
    if changes := changed_settings(checkpoint_dir, settings):
        notes.append(f"changed since the checkpoint: {', '.join(changes)}")
    return notes


def changed_settings(checkpoint_dir: Path, settings: dict[str, Any]) -> list[str]:
    """Return `NAME BEFORE -> NOW` for every setting that differs from a checkpoint's and whose effect is no surprise.

    Args:
        checkpoint_dir: The checkpoint to resume from.
        settings: Settings of the present run, as plain data.
    """
    differences = _differences(read(checkpoint_dir), settings)
    return [f"{name} {before} -> {now}" for name, before, now in differences if _effect_of(name) is None]


def _differences(saved: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield every setting that differs, with its values as text."""
    flat_before, flat_now = flat(saved), flat(settings)
    for name in dict.fromkeys([*flat_before, *flat_now]):
        before, now = (shown(values.get(name)) for values in (flat_before, flat_now))
        # A setting missing on one side may not exist in that version, unless its default is null: nulls are not saved.
        comparable = (
            (name in flat_before and name in flat_now)
            or name.startswith(("model_config.", "data."))
            or _is_null_by_default(name)
            or _is_kept_by_the_optimizer(name)
        )
        if before != now and comparable and name not in _OF_THE_START:
            yield name, before, now


def _effect_of(name: str) -> str | None:
    """Return the surprising effect of changing a setting, or None if it has the usual one."""
    if _is_kept_by_the_optimizer(name):
        return "it has no effect: the optimizer's state of the checkpoint has its own"
    return _EFFECTS.get(name)


def _is_null_by_default(name: str) -> bool:
    section, _, setting = name.partition(".")
    kinds = {field.name: field.type for field in fields(Settings)}
    if not setting:
        return True
    kind = kinds.get(section)
    return is_dataclass(kind) and any(field.name == setting and field.default is None for field in fields(kind))


def _is_kept_by_the_optimizer(name: str) -> bool:
    # All of its arguments, given or not, except the learning rate, which the schedule sets.
    argument = name.startswith("optimizer.") and name not in ("optimizer.class_path", "optimizer.lr")
    return argument or name.startswith(f"{ParameterGroupArgs.key}.")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as values by dotted names, without `init_args`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name.replace(".init_args.", "."): value}
    return found


def shown(value: Any) -> str:
    """Return a value as written in a recipe."""
    return "null" if value is None else str(value)
