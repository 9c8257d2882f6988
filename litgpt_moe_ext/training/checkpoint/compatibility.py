"""Whether a checkpoint belongs to the model and optimizer of a run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES, routers_need
from litgpt_moe_ext.config.fields import FIELDS
from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError
from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE, read_config
from litgpt_moe_ext.recipe_files import class_path_of
from litgpt_moe_ext.training.checkpoint.changes import shown
from litgpt_moe_ext.training.checkpoint.hyperparameters import read
from litgpt_moe_ext.training.checkpoint.progress import sequences_of
from litgpt_moe_ext.training.settings import ParameterGroupArgs
from litgpt_moe_ext.wording import in_shell, quoted

# Fields that a run starting from weights may change: how rows are read. With a longer context, rotations as well.
_OF_ROWS = {
    "block_size",
    "attention_document_boundary",
    "attention_document_token_id",
    "attention_document_restart_positions",
    "streaming_cache_first",
    "streaming_cache_window",
}


def require_same_model(setting: str, checkpoint_dir: Path, config: Any) -> None:
    """Raise SettingsError, naming the fields that differ, if a checkpoint's model is not the one of `config`.

    Args:
        setting: Name of the setting that names the checkpoint.
        checkpoint_dir: A checkpoint directory.
        config: The `litgpt.Config` of the run.
    """
    saved, now = asdict(read_config(checkpoint_dir, setting)), asdict(config)
    if setting == "initial_checkpoint_dir" and config.mlp_class_name in MOE_CLASS_NAMES:
        saved = _of_this_package(saved, config)
    differences = [
        f"{name} is {saved.get(name)!r} in the checkpoint and {value!r} now"
        for name, value in now.items()
        if saved.get(name) != value
        and not _may_differ(setting, name, saved.get(name), value)
        and not (setting == "initial_checkpoint_dir" and name in _context_of(saved, now))
    ]
    if differences:
        remedy = f"--model_config {in_shell(checkpoint_dir)} takes its model"
        remedy += "." if setting == "initial_checkpoint_dir" else "; start a new run with another --out_dir."
        if setting == "initial_checkpoint_dir" and config.mlp_class_name in MOE_CLASS_NAMES and not saved["n_expert"]:
            command = in_shell("litgpt-moe", "upcycle", checkpoint_dir, "RECIPE", "NEW_DIRECTORY")
            remedy = f"`{command}` makes an MoE model of this dense one."
        raise SettingsError(
            f"{setting}: {quoted(checkpoint_dir)} holds another model: {'; '.join(differences)}. {remedy}"
        )


def _of_this_package(saved: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the fields of a model with LitGPT's `LLaMAMoE` as those of an MoE that computes the same; others as is."""
    if saved["mlp_class_name"] != "LLaMAMoE":
        return saved
    same = {"mlp_class_name": config.mlp_class_name, "mlp_activation": "swiglu"}
    if routers_need(config, "softmax_of_chosen"):
        same["router_type"] = config.router_type
    else:
        groups = saved["n_expert_groups"] is not None
        same |= {"router_type": "topk", "router_score_function": "sigmoid" if groups else "softmax"}
        same["norm_topk_prob"] = saved["norm_topk_prob"] if groups else True
    return saved | same


def start_notes(checkpoint_dir: Path, config: Any) -> list[str]:
    """Return a line for every field that makes a model read its rows differently from the model of its weights.

    Args:
        checkpoint_dir: Checkpoint of the initial weights.
        config: The `litgpt.Config` of the run.
    """
    saved, now = asdict(read_config(checkpoint_dir, "initial_checkpoint_dir")), asdict(config)
    return [
        f"model_config.{name} was {shown(saved.get(name))} for these weights and is {shown(now[name])} now"
        for name in sorted(_context_of(saved, now))
        if saved.get(name) != now[name]
    ]


def _context_of(saved: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return the fields that may differ from those of the initial weights' model."""
    if now.get("position_embedding") == "learned":  # a row of weights for every position
        return _OF_ROWS - {"block_size"}
    if now["block_size"] <= saved["block_size"]:
        return _OF_ROWS
    # Ways to extend a context. If an earlier extension is gone, its setting was probably forgotten: refuse that.
    context = set(_OF_ROWS)
    if now["rope_adjustments"] is not None:
        context.add("rope_adjustments")
    if now["rope_base"] > saved["rope_base"]:
        context.add("rope_base")
    return context


def _may_differ(setting: str, name: str, before: Any, now: Any) -> bool:
    if name == "router_bias_update_schedule" and setting == "resume" and None in (before, now):
        return False  # a checkpoint without a schedule lacks the step count that a schedule needs
    return name in ("name", "hf_config") or (name in FIELDS and FIELDS[name].of_training)


def require_same_weights(setting: str, checkpoint_dir: Path, config: Any) -> None:
    """Raise SettingsError, naming some differences, unless the weights in a checkpoint fit a model by name and shape.

    Args:
        setting: Name of the setting that names the checkpoint.
        checkpoint_dir: A checkpoint directory.
        config: The `litgpt.Config` of the run.
    """
    from torch import Tensor

    from litgpt_moe_ext.files.archives import COPY_AGAIN, open_archive, shortened
    from litgpt_moe_ext.meta.models import meta_model

    file = checkpoint_dir / WEIGHTS_FILE
    content = open_archive(file, setting)
    weights = content.get("model", content)
    if isinstance(weights, dict):
        weights = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in weights.items()}
    try:
        meta_model(config).load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # names or shapes differ, or the weights are no dict
        difference = shortened(error).removeprefix("Error(s) in loading state_dict for GPT: ").rstrip(".")
        raise SettingsError(
            f"{setting}: {quoted(file)} holds other weights than the model beside it: {difference}; {COPY_AGAIN}"
        ) from error


def require_one_table(checkpoint_dir: Path) -> None:
    """Raise SettingsError if `train.tie_embeddings` would lose one of two different tables.

    Args:
        checkpoint_dir: Checkpoint of the initial weights, of the same model.
    """
    import torch

    from litgpt_moe_ext.files.archives import open_archive

    content = open_archive(checkpoint_dir / WEIGHTS_FILE, "initial_checkpoint_dir")
    weights = content.get("model", content)
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise SettingsError(
            f"train.tie_embeddings: true would lose a table: output head and token embeddings differ in "
            f"initial_checkpoint_dir {quoted(checkpoint_dir)}; set it to false"
        )


def require_same_optimizer(checkpoint_dir: Path, settings: dict[str, Any]) -> None:
    """Raise SettingsError if a checkpoint's optimizer state is of another class than the settings' optimizer."""
    before, now = _class_name(read(checkpoint_dir).get("optimizer")), _class_name(settings["optimizer"])
    if before is not None and before != now:
        raise SettingsError(
            f"resume: {quoted(checkpoint_dir)} holds the state of the optimizer {before}, not of {now}. Resume with "
            f"{before}, or {FROM_ITS_WEIGHTS}."
        )


def require_same_groups(checkpoint_dir: Path, settings: dict[str, Any], config: Any) -> None:
    """Raise SettingsError if the parameters are grouped differently from a checkpoint's optimizer state.

    Args:
        checkpoint_dir: A checkpoint directory.
        settings: Settings of the present run, as plain data.
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
                f"optimizer state is grouped by it; resume with that, or {FROM_ITS_WEIGHTS}"
            )


def require_same_tables(checkpoint_dir: Path, tied: bool) -> None:
    """Raise SettingsError if only one of a checkpoint and a run ties the output head to the token embeddings.

    Args:
        checkpoint_dir: A checkpoint directory.
        tied: The run's `train.tie_embeddings`.
    """
    train = read(checkpoint_dir).get("train")
    if isinstance(train, dict) and bool(train.get("tie_embeddings")) != tied:
        raise SettingsError(
            f"train.tie_embeddings: {tied} must be {not tied}, as in the checkpoint, whose optimizer state depends "
            f"on it; resume with that, or {FROM_ITS_WEIGHTS}"
        )


def require_whole_steps(checkpoint_dir: Path, global_batch_size: int) -> None:
    """Raise SettingsError unless a checkpoint's number of trained sequences is a multiple of this batch size."""
    sequences = sequences_of(checkpoint_dir)
    if sequences is not None and sequences % global_batch_size:
        raise SettingsError(
            f"train.global_batch_size: {global_batch_size} does not divide the {sequences} sequences that the "
            "checkpoint was trained on; resume with the batch it had, or one that does"
        )


def _class_name(optimizer: Any) -> str | None:
    path = class_path_of(optimizer)
    return path.rpartition(".")[2] if isinstance(path, str) else None
