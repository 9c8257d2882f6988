"""What a resumed run takes from its checkpoint although the settings now say something else."""

from pathlib import Path
from typing import Any

from litgpt_moe_ext.training.checkpoint.hyperparameters import FILE_NAME, read

_EFFECTS = {
    ("seed",): "it has no effect: weights and random generators are those of the checkpoint",
    ("train", "global_batch_size"): "from here on a step has another number of tokens",
    ("train", "max_tokens"): "the learning rate goes on in the schedule of the new length",
    ("schedule", "name"): "the learning rate goes on in the new schedule, at the step of the checkpoint",
    ("optimizer", "init_args", "weight_decay"): "it has no effect: the optimizer's state of the checkpoint has its own",
    ("optimizer", "init_args", "betas"): "it has no effect: the optimizer's state of the checkpoint has its own",
    ("optimizer", "init_args", "eps"): "it has no effect: the optimizer's state of the checkpoint has its own",
    ("initial_checkpoint_dir",): "it has no effect: the weights are those of the checkpoint",
}


def resume_notes(checkpoint_dir: Path, settings: dict[str, Any]) -> list[str]:
    """Return a line for every setting that differs from the checkpoint's and whose effect may surprise.

    Args:
        checkpoint_dir: The checkpoint to resume from.
        settings: Of the present run, as plain data.
    """
    saved = read(checkpoint_dir)
    if not saved:
        return [f"{checkpoint_dir} has no readable {FILE_NAME}: changed settings go unnoticed"]
    notes = []
    for keys, effect in _EFFECTS.items():
        before, now = _look_up(saved, keys), _look_up(settings, keys)
        if before != now and before is not None and now is not None:
            notes.append(f"{'.'.join(keys)} was {before} in the checkpoint and is {now} now: {effect}")
    return notes


def _look_up(settings: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings
