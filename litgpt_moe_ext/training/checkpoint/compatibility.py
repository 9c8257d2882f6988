"""Whether a checkpoint belongs to the model and optimizer of a run, and which of its settings differ."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES
from litgpt_moe_ext.config.fields import FIELDS
from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError
from litgpt_moe_ext.host.checkpoints import read_config
from litgpt_moe_ext.training.checkpoint.hyperparameters import FILE_NAME, read
from litgpt_moe_ext.training.checkpoint.progress import MODEL_FILE, sequences_of
from litgpt_moe_ext.training.settings import ParameterGroupArgs

# What a resumed run takes from its checkpoint although the settings now say something else.
_EFFECTS = {
    ("seed",): "it has no effect: weights and random generators are those of the checkpoint",
    ("train", "global_batch_size"): (
        "from here on a step has another number of tokens; the learning rate goes on after as many tokens as before"
    ),
    ("train", "max_tokens"): "the learning rate goes on in the schedule of the new length",
    ("schedule", "name"): "the learning rate goes on in the new schedule, at the step of the checkpoint",
}
# Fields that a run which starts from weights may change: how rows are read. With a longer context, rotations as well.
_OF_ROWS = {
    "block_size",
    "attention_document_boundary",
    "attention_document_token_id",
    "attention_document_restart_positions",
    "streaming_cache_first",
    "streaming_cache_window",
}
# What belongs to one start of a run, and may differ in the next.
_OF_THE_START = {"resume", "out_dir", "progress", "initial_checkpoint_dir"}


def require_same_model(setting: str, checkpoint_dir: Path, config: Any) -> None:
    """Raise SettingsError, naming the fields that differ, if a checkpoint holds another model than `config` describes.

    Args:
        setting: Name of the setting that names the checkpoint.
        checkpoint_dir: A checkpoint directory.
        config: The `litgpt.Config` of the run.
    """
    saved, now = asdict(read_config(checkpoint_dir, setting)), asdict(config)
    differences = [
        f"{name} is {saved.get(name)!r} in the checkpoint and {value!r} now"
        for name, value in now.items()
        if saved.get(name) != value
        and not _may_differ(setting, name, saved.get(name), value)
        and not (setting == "initial_checkpoint_dir" and name in _context_of(saved, now))
    ]
    if differences:
        remedy = f"--model_config {shlex.quote(str(checkpoint_dir))} takes its model"
        remedy += "." if setting == "initial_checkpoint_dir" else "; start a new run with another --out_dir."
        if setting == "initial_checkpoint_dir" and config.mlp_class_name in MOE_CLASS_NAMES and not saved["n_expert"]:
            command = shlex.join(["litgpt-moe", "upcycle", str(checkpoint_dir), "RECIPE", "NEW_DIRECTORY"])
            remedy = f"`{command}` makes an MoE model of this dense one."
        raise SettingsError(
            f"{setting}: {str(checkpoint_dir)!r} holds another model: {'; '.join(differences)}. {remedy}"
        )


def start_notes(checkpoint_dir: Path, config: Any) -> list[str]:
    """Return a line for every field by which a model reads its rows otherwise than the one whose weights it has.

    Args:
        checkpoint_dir: Where its weights come from.
        config: The `litgpt.Config` of the run.
    """
    saved, now = asdict(read_config(checkpoint_dir, "initial_checkpoint_dir")), asdict(config)
    return [
        f"model_config.{name} was {_shown(saved.get(name))} for these weights and is {_shown(now[name])} now"
        for name in sorted(_context_of(saved, now))
        if saved.get(name) != now[name]
    ]


def _context_of(saved: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return the fields in which a model may differ from the one whose weights it starts from."""
    if now.get("position_embedding") == "learned":  # a row of weights for every position
        return _OF_ROWS - {"block_size"}
    if now["block_size"] <= saved["block_size"]:
        return _OF_ROWS
    # Ways to extend a context. One that was extended before, and is not any more, is a setting that was forgotten.
    context = set(_OF_ROWS)
    if now["rope_adjustments"] is not None:
        context.add("rope_adjustments")
    if now["rope_base"] > saved["rope_base"]:
        context.add("rope_base")
    return context


def _may_differ(setting: str, name: str, before: Any, now: Any) -> bool:
    if name == "router_bias_update_schedule" and setting == "resume" and None in (before, now):
        return False  # a checkpoint without a schedule has no count of the steps that one goes by
    return name in ("name", "hf_config") or (name in FIELDS and FIELDS[name].of_training)


def require_same_weights(setting: str, checkpoint_dir: Path, config: Any) -> None:
    """Raise SettingsError, naming some that differ, if a model would not take the weights in a checkpoint.

    Only names and shapes are looked at.

    Args:
        setting: Name of the setting that names the checkpoint.
        checkpoint_dir: A checkpoint directory.
        config: The `litgpt.Config` of the run.
    """
    from torch import Tensor

    from litgpt_moe_ext.files.archives import COPY_AGAIN, open_archive, shortened
    from litgpt_moe_ext.meta.models import meta_model

    file = checkpoint_dir / MODEL_FILE
    content = open_archive(file, setting)
    weights = content.get("model", content)
    if isinstance(weights, dict):
        weights = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in weights.items()}
    try:
        meta_model(config).load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # how torch says that names or shapes differ, or that it is no dict
        difference = shortened(error).removeprefix("Error(s) in loading state_dict for GPT: ").rstrip(".")
        raise SettingsError(
            f"{setting}: {str(file)!r} holds other weights than the model beside it: {difference}; {COPY_AGAIN}"
        ) from error


def require_one_table(checkpoint_dir: Path) -> None:
    """Raise SettingsError if a run with `train.tie_embeddings` would lose one of two tables.

    Args:
        checkpoint_dir: Where its weights come from, those of its model.
    """
    import torch

    from litgpt_moe_ext.files.archives import open_archive

    content = open_archive(checkpoint_dir / MODEL_FILE, "initial_checkpoint_dir")
    weights = content.get("model", content)
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise SettingsError(
            f"train.tie_embeddings: true would lose a table: output head and token embeddings differ in "
            f"initial_checkpoint_dir {str(checkpoint_dir)!r}; set it to false"
        )


def require_same_optimizer(checkpoint_dir: Path, settings: dict[str, Any]) -> None:
    """Raise SettingsError if a checkpoint holds the state of an optimizer of another class than the settings name."""
    before, now = _class_name(read(checkpoint_dir).get("optimizer")), _class_name(settings["optimizer"])
    if before is not None and before != now:
        raise SettingsError(
            f"resume: {str(checkpoint_dir)!r} holds the state of the optimizer {before}, not of {now}. Resume with "
            f"{before}, or {FROM_ITS_WEIGHTS}."
        )


def require_same_groups(checkpoint_dir: Path, settings: dict[str, Any], config: Any) -> None:
    """Raise SettingsError if the parameters are sorted otherwise than the state of a checkpoint's optimizer.

    Args:
        checkpoint_dir: A checkpoint directory.
        settings: Of the present run, as plain data.
        config: The `litgpt.Config` of the run.
    """
    before, now = (plain.get(ParameterGroupArgs.key) for plain in (read(checkpoint_dir), settings))
    if not isinstance(before, dict) or not isinstance(now, dict) or before == now:
        return
    from litgpt_moe_ext.meta.models import meta_model
    from litgpt_moe_ext.training.optim.arguments import is_muon
    from litgpt_moe_ext.training.optim.parameter_groups import group_parameters

    model, split = meta_model(config), is_muon(settings["optimizer"])
    for name, value in now.items():
        if name not in before or before[name] == value:
            continue
        ours, theirs = (
            [[id(parameter) for parameter in group["params"]] for group in group_parameters(model, args, split)]
            for args in (ParameterGroupArgs(**now), ParameterGroupArgs(**{**now, name: before[name]}))
        )
        if ours != theirs:
            raise SettingsError(
                f"{ParameterGroupArgs.key}.{name}: {value} must be {before[name]}, as in the checkpoint, whose "
                f"optimizer's state is sorted by it; resume with that, or {FROM_ITS_WEIGHTS}"
            )


def require_same_tables(checkpoint_dir: Path, tied: bool) -> None:
    """Raise SettingsError if a checkpoint's output head and token embeddings are one table and a run's two, or not so.

    Args:
        checkpoint_dir: A checkpoint directory.
        tied: The run's `train.tie_embeddings`.
    """
    train = read(checkpoint_dir).get("train")
    if isinstance(train, dict) and bool(train.get("tie_embeddings")) != tied:
        raise SettingsError(
            f"train.tie_embeddings: {tied} must be {not tied}, as in the checkpoint, whose optimizer's state is for "
            f"that; resume with that, or {FROM_ITS_WEIGHTS}"
        )


def require_whole_steps(checkpoint_dir: Path, global_batch_size: int) -> None:
    """Raise SettingsError unless the sequences that a checkpoint was trained on are whole steps of this batch size."""
    sequences = sequences_of(checkpoint_dir)
    if sequences is not None and sequences % global_batch_size:
        raise SettingsError(
            f"train.global_batch_size: {global_batch_size} does not divide the {sequences} sequences that the "
            "checkpoint was trained on; resume with the batch it had, or one that does"
        )


def _class_name(optimizer: Any) -> str | None:
    path = optimizer.get("class_path") if isinstance(optimizer, dict) else optimizer
    return path.rpartition(".")[2] if isinstance(path, str) else None


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
    for name, before, now in _differences(saved, settings):
        if _is_kept_by_the_optimizer(name):
            notes.append(
                f"{name} was {before} in the checkpoint and is {now} now: it has no effect: the optimizer's state of "
                "the checkpoint has its own"
            )
    if changes := changed_settings(checkpoint_dir, settings):  # what they say now holds from here on
        notes.append(f"changed since the checkpoint: {', '.join(changes)}")
    return notes


def changed_settings(checkpoint_dir: Path, settings: dict[str, Any]) -> list[str]:
    """Return `NAME BEFORE -> NOW` for every setting that is another one than in a checkpoint, and has an effect.

    Args:
        checkpoint_dir: The checkpoint to resume from.
        settings: Of the present run, as plain data.
    """
    saved = read(checkpoint_dir)
    flat_before, flat_now = _flat(saved), _flat(settings)
    changes = []
    for name, before, now in _differences(saved, settings):
        # Another version may have had other settings in a section; those that are null by default are not written down
        # while they are.
        in_both = name in flat_before and name in flat_now
        comparable = in_both or name.startswith(("model_config.", "data.")) or _is_null_by_default(name)
        if comparable and not _is_kept_by_the_optimizer(name):
            changes.append(f"{name} {before} -> {now}")
    return changes


def _differences(saved: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield every setting that differs, with its values as text, but for those that have a line of their own."""
    flat_before, flat_now = _flat(saved), _flat(settings)
    told = {".".join(keys) for keys in _EFFECTS} | _OF_THE_START
    for name in dict.fromkeys([*flat_before, *flat_now]):
        before, now = (_shown(flat.get(name)) for flat in (flat_before, flat_now))
        if before != now and name not in told:
            yield name, before, now


def _is_null_by_default(name: str) -> bool:
    from litgpt_moe_ext.training.settings import Settings

    section, _, setting = name.partition(".")
    kinds = {field.name: field.type for field in fields(Settings)}
    if not setting:
        return True
    kind = kinds.get(section)
    return is_dataclass(kind) and any(field.name == setting and field.default is None for field in fields(kind))


def _is_kept_by_the_optimizer(name: str) -> bool:
    # All of its arguments, given or not, but for the rate, which the schedule sets anew.
    argument = name.startswith("optimizer.") and name not in ("optimizer.class_path", "optimizer.lr")
    return argument or name.startswith(f"{ParameterGroupArgs.key}.")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name.replace(".init_args.", "."): value}
    return flat


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _look_up(settings: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings
