"""Checkpoint directories: written whole or not at all, and the newest whole one found again.

A checkpoint is LitGPT's: `lit_model.pth` (model, optimizer, data position, counters), `model_config.yaml`,
`hyperparameters.yaml` and the tokenizer's files; `training_state.json` says in plain text where the run stood, and
`SHA256SUMS` what every file must look like.
"""

import json
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES
from litgpt_moe_ext.durable import flush, flush_tree
from litgpt_moe_ext.training.checkpoint import manifest

MODEL_FILE = "lit_model.pth"
STATE_FILE = "training_state.json"


def publish(staging: Path, target: Path) -> None:
    """Move a finished directory to its final name; a directory of that name is replaced, never lost half-way.

    Args:
        staging: Directory with everything in it, on the same file system as `target`.
        target: Where it shall be.
    """
    flush_tree(staging)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists() and not (target / STATE_FILE).is_file():
        # Not written by a run like this one: it may hold what nobody can make again.
        target.rename(_free_name(target))
    elif target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    staging.rename(target)
    flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were."""


def remove(directory: Path) -> None:
    """Delete a checkpoint; half of it is never found under its name."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(out_dir: Path) -> list[str]:
    """Finish or undo what a killed run left in the middle of; only for the one run that works in `out_dir`.

    Returns:
        What was done, one line each.
    """
    done = []
    for path in sorted(out_dir.glob(".*.replaced")):
        original = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(original)
            done.append(f"Found {original} under the name it had while it was being replaced, and named it back.")
    for pattern in (".*.incomplete", ".*.removed"):
        for path in out_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    return done


def save_whole(save: Callable[..., None], fabric: Any, state: dict, tokenizer_dir: Path | None, file: Path) -> None:
    """Save a checkpoint under a temporary name and rename it when it is complete.

    Args:
        save: LitGPT's `save_checkpoint`, or one with its arguments.
        fabric: The running `TrainingFabric`; every process must call.
        state: LitGPT's training state.
        tokenizer_dir: Whose files to copy beside the model.
        file: The final path of the model file; its parent is the checkpoint directory.

    Raises:
        SaveError: On every process, if the first could not write.
    """
    target = file.parent
    staging = target.with_name(f".{target.name}.incomplete")
    extended = {**state, "rng": _rng_of_all_processes(fabric), "callbacks": fabric.callback_states()}

    def finish() -> None:
        if fabric.is_global_zero:
            progress = {
                "step": state["step_count"],
                "iteration": state["iter_num"],
                "processes": fabric.world_size,
                "saved_at": time.time(),
            }
            (staging / STATE_FILE).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
            manifest.write(staging)
            publish(staging, target)

    if fabric.is_global_zero:
        shutil.rmtree(staging, ignore_errors=True)
    fabric.barrier()
    for part in (
        lambda: save(fabric, extended, tokenizer_dir, staging / file.name),
        lambda: fabric.call("on_checkpoint_staged", directory=staging),
        finish,
    ):
        if problem := _try_everywhere(fabric, part):
            if fabric.is_global_zero:
                shutil.rmtree(staging, ignore_errors=True)
            raise SaveError(f"{target} could not be saved: {problem}")


def _try_everywhere(fabric: Any, action: Callable[[], Any]) -> str | None:
    # Only the first process writes files; the others must hear of its failure instead of waiting for it. torch reports
    # a full disk as a RuntimeError.
    problem = None
    try:
        action()
    except (OSError, RuntimeError) as error:
        if not fabric.is_global_zero:
            raise
        problem = str(error) or type(error).__name__
    return fabric.broadcast(problem)


def problem_with(checkpoint_dir: Path) -> str | None:
    """Return why a checkpoint directory cannot be resumed from, or None if it is whole.

    Reads every file once and compares it with its checksum. A checkpoint of plain LitGPT has none; there, those inside
    the model file are used.
    """
    for name in (MODEL_FILE, "model_config.yaml"):
        if not (checkpoint_dir / name).is_file():
            return f"{name} is missing"
    if (checkpoint_dir / manifest.FILE_NAME).is_file():
        return manifest.problem_with(checkpoint_dir)
    try:
        with zipfile.ZipFile(checkpoint_dir / MODEL_FILE) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"{MODEL_FILE} is truncated or damaged ({error})"
    return None if damaged is None else f"{MODEL_FILE} is damaged in its record {damaged}"


def _age_of(checkpoint_dir: Path) -> tuple[float, int] | None:
    # When it was saved and after which step; the time is in the file because copying changes that of the file system.
    # A checkpoint of plain LitGPT has its step in the name only. None for what is no checkpoint.
    try:
        state = json.loads((checkpoint_dir / STATE_FILE).read_text(encoding="utf-8"))
        return state["saved_at"], state["step"]
    except (OSError, ValueError, KeyError, TypeError):
        _, _, digits = checkpoint_dir.name.partition("step-")
        return (0.0, int(digits)) if digits.isdecimal() else None


def step_of(checkpoint_dir: Path) -> int | None:
    """Return after which optimizer step a checkpoint was saved, or None if nothing says so."""
    age = _age_of(checkpoint_dir)
    return None if age is None else age[1]


def batch_of(checkpoint_dir: Path) -> int | None:
    """Return the sequences of an iteration over all processes when a checkpoint was written, or None if unknown."""
    try:
        processes = json.loads((checkpoint_dir / STATE_FILE).read_text(encoding="utf-8"))["processes"]
        settings = yaml.safe_load((checkpoint_dir / "hyperparameters.yaml").read_text(encoding="utf-8"))
        return processes * settings["train"]["micro_batch_size"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def newest_first(out_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run (`step-*`, `best` and `final`), the last saved first, whole or not."""
    ages = {path: _age_of(path) for path in out_dir.glob("*") if path.is_dir() and not path.name.startswith(".")}
    # `best` may be a second name of another; the other is what a user looks for.
    found = {path: (*age, path.name != "best") for path, age in ages.items() if age is not None}
    if all(saved_at for saved_at, *_ in found.values()):
        return sorted(found, key=lambda path: found[path], reverse=True)
    # Where one does not say when it was saved, steps are all there is to compare.
    return sorted(found, key=lambda path: found[path][1], reverse=True)


def set_aside(out_dir: Path) -> Path | None:
    """Move the checkpoints of an earlier run out of the way of a new one.

    Returns:
        The directory beside `out_dir` that holds them now, or None if there were none.
    """
    found = newest_first(out_dir)
    if not found:
        return None
    aside = _free_name(out_dir)
    aside.mkdir()
    for checkpoint_dir in found:
        checkpoint_dir.rename(aside / checkpoint_dir.name)
    return aside


def _free_name(directory: Path) -> Path:
    number = 1
    while (free := directory.with_name(f"{directory.name}-earlier-{number}")).exists():
        number += 1
    return free


def find_resume_file(
    resume: bool | Literal["auto"] | Path, out_dir: Path, say: Callable[[str], None] = print
) -> Path | Literal[False]:
    """Return the model file to resume from, or False to start anew.

    Args:
        resume: False; `"auto"` for the newest whole checkpoint if there is one; True for the same, which must exist; or
            the path of a checkpoint directory, of its model file, or of a run's directory, whose newest is taken.
        out_dir: The run's directory.
        say: Told about every checkpoint that is passed over.

    Raises:
        FileNotFoundError: If a checkpoint was asked for and there is no whole one.
    """
    if resume is False or resume is None:
        return False
    if resume not in (True, "auto"):
        directory = Path(resume).parent if Path(resume).suffix == ".pth" else Path(resume)
        if not (directory / MODEL_FILE).is_file() and newest_first(directory):
            return find_resume_file(True, directory, say)
        if problem := problem_with(directory):
            raise FileNotFoundError(f"resume: {str(resume)!r} is not a whole checkpoint: {problem}")
        return directory / MODEL_FILE
    damaged = []
    for directory in newest_first(out_dir):
        problem = problem_with(directory)
        if problem is None:
            return directory / MODEL_FILE
        damaged.append(str(directory))
        say(f"Passing over checkpoint {directory}: {problem}")
    if damaged:
        # Starting anew here would overwrite the run that the user meant to continue.
        raise FileNotFoundError(
            f"resume: {resume!r} found only damaged checkpoints ({', '.join(damaged)}). Move them away to start "
            "anew, or choose another --out_dir."
        )
    if resume is True:
        raise FileNotFoundError(
            f"resume: true, but there is no checkpoint in out_dir: {str(out_dir)!r}; use --resume auto"
        )
    return False


def require_same_model(setting: str, checkpoint_dir: Path, config: Any) -> None:
    """Raise ValueError, naming the fields that differ, if a checkpoint holds another model than `config` describes.

    Args:
        setting: Name of the setting that names the checkpoint.
        checkpoint_dir: A checkpoint directory.
        config: The `litgpt.Config` of the run.
    """
    file = checkpoint_dir / "model_config.yaml"
    try:
        saved = asdict(type(config).from_file(file))
    except (TypeError, ValueError, AssertionError, yaml.YAMLError, OSError) as error:
        raise ValueError(f"{setting}: {file} cannot be read: {error}") from error
    differences = [
        f"{name} is {saved.get(name)!r} in the checkpoint and {value!r} now"
        for name, value in asdict(config).items()
        if saved.get(name) != value and name not in ("name", "hf_config")
    ]
    if differences:
        remedy = "Use its model configuration, or start anew with another --out_dir."
        if setting == "initial_checkpoint_dir" and config.mlp_class_name in MOE_CLASS_NAMES and not saved["n_expert"]:
            remedy = f"`litgpt-moe upcycle {checkpoint_dir} RECIPE NEW_DIRECTORY` makes an MoE model of this dense one."
        raise ValueError(f"{setting}: {str(checkpoint_dir)!r} holds another model: {'; '.join(differences)}. {remedy}")


def require_same_optimizer(checkpoint_dir: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the optimizer whose state a checkpoint holds is of another class than that of `settings`."""
    try:
        saved = yaml.safe_load((checkpoint_dir / "hyperparameters.yaml").read_text(encoding="utf-8")).get("optimizer")
    except (OSError, AttributeError, yaml.YAMLError):
        return
    before, now = _class_name(saved), _class_name(settings["optimizer"])
    if saved is not None and before != now:
        raise ValueError(
            f"resume: {str(checkpoint_dir)!r} holds the state of the optimizer {before}, not of {now}. Resume with "
            f"{before}, or start anew from its weights with initial_checkpoint_dir."
        )


def _class_name(optimizer: str | dict) -> str:
    path = optimizer["class_path"] if isinstance(optimizer, dict) else optimizer
    return path.rpartition(".")[2]


def rng_state() -> dict[str, Any]:
    """Return the state of the random generators that training draws from (torch on CPU and CUDA, Python)."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(), "python": random.getstate()}


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set the random generators to a state that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _rng_of_all_processes(fabric: Any) -> list[dict[str, Any]]:
    if fabric.world_size == 1:
        return [rng_state()]
    states: list = [None] * fabric.world_size
    torch.distributed.all_gather_object(states, rng_state())
    return states
