"""The choice of the checkpoint to resume from: the newest whole one, or the named one."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError, in_shards
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from litgpt_moe_ext.training.checkpoint.progress import (
    STATE_FILE,
    checkpoint_around,
    holds_state_of_training,
    newest_first,
)
from litgpt_moe_ext.wording import quoted

_NEEDED = (WEIGHTS_FILE, CONFIG_FILE)


def problem_with(checkpoint_dir: Path, read_all: bool = True) -> str | None:
    """Return why a checkpoint directory cannot be resumed from, or None if it is whole.

    Every file is read and compared with its checksum. For a checkpoint of plain LitGPT, which has no `SHA256SUMS`, the
    checksums inside the model file are used.

    Args:
        checkpoint_dir: The directory.
        read_all: Whether to read the tensors in the model file as well.
    """
    if not checkpoint_dir.is_dir():
        return "there is no such directory"
    for name in _NEEDED:
        if not (checkpoint_dir / name).is_file():
            return f"{name} is missing{in_shards(checkpoint_dir / name)}"
    if (checkpoint_dir / checksums.FILE_NAME).is_file():
        return checksums.problem_with(checkpoint_dir, required=_NEEDED, archive=None if read_all else WEIGHTS_FILE)
    if (checkpoint_dir / STATE_FILE).exists():  # runs that write this file also write checksums
        return f"{checksums.FILE_NAME} is missing"
    return _problem_inside(checkpoint_dir, read_all)


def damage_of(checkpoint_dir: Path, read_all: bool = True) -> str | None:
    """Return what is wrong with the weights of a checkpoint directory, or None; its other files may have changed.

    Args:
        checkpoint_dir: The directory.
        read_all: Whether to read the tensors in the model file as well.
    """
    if read_all and (checkpoint_dir / checksums.FILE_NAME).is_file():
        return checksums.problem_with(checkpoint_dir, only=WEIGHTS_FILE)
    return _problem_inside(checkpoint_dir, read_all)


def _problem_inside(checkpoint_dir: Path, read_all: bool) -> str | None:
    look = checksums.problem_inside if read_all else checksums.problem_with_names
    return look(checkpoint_dir / WEIGHTS_FILE)


def find_resume_file(
    resume: bool | Literal["auto"] | Path,
    out_dir: Path,
    say: Callable[[str], None] = print,
    read_all: bool = True,
) -> Path | None:
    """Return the model file to resume from, or None to start anew.

    Args:
        resume: False to start anew; `"auto"` for the newest whole checkpoint, if any; True to require one; or the path
            of a checkpoint directory, of its model file, or of a run's directory, for the newest in it.
        out_dir: The run's directory.
        say: Told about every damaged checkpoint that is skipped.
        read_all: As in `problem_with`.

    Raises:
        SettingsError: If a checkpoint is required and there is no whole one, or all that exist are damaged.
    """
    if resume is False:
        return None
    if not isinstance(resume, bool) and resume != "auto":
        directory = Path(resume).parent if Path(resume).suffix == ".pth" else Path(resume)
        if not (directory / WEIGHTS_FILE).is_file() and newest_first(directory):
            return find_resume_file(True, directory, say, read_all)
        if problem := problem_with(directory, read_all):
            raise SettingsError(
                f"resume: {quoted(resume)} is not a whole checkpoint: {problem}; name another, or use --resume auto"
            )
        return _with_state(directory)
    damaged = []
    found = newest_first(out_dir)
    # Damage may hide a checkpoint's place in the order. Such checkpoints come first, so that each is reported.
    for directory in sorted(found, key=_says_when):
        problem = problem_with(directory, read_all)
        if problem is None:
            return _with_state(directory)
        damaged.append(str(directory))
        say(f"Skipping checkpoint {directory}: {problem}")
    if damaged:
        # Starting anew here would overwrite the run that the user meant to continue.
        raise SettingsError(
            f"resume: {resume!r} found only damaged checkpoints ({', '.join(damaged)}). Move them away to start "
            "anew, or choose another --out_dir."
        )
    if resume is True:
        raise SettingsError(
            f"resume: true, but there is no checkpoint in out_dir: {quoted(out_dir)}; use --resume auto"
        )
    return None


def _with_state(checkpoint_dir: Path) -> Path:
    """Return the model file of a whole checkpoint; refuse weights alone, before anything is moved out of their way."""
    file, around = checkpoint_dir / WEIGHTS_FILE, checkpoint_around(checkpoint_dir)
    if not holds_state_of_training(file):
        raise SettingsError(
            f"resume: {quoted(checkpoint_dir)} holds weights alone, without the state of a training; "
            f"{f'resume {quoted(around)}, or ' if around != checkpoint_dir else ''}{FROM_ITS_WEIGHTS}"
        )
    return file


def _says_when(checkpoint_dir: Path) -> bool:
    """Return whether a checkpoint's record of when it was saved can be trusted; for plain LitGPT it is the name."""
    if (checkpoint_dir / checksums.FILE_NAME).exists():
        return checksums.problem_with(checkpoint_dir, required=(STATE_FILE,), only=STATE_FILE) is None
    return not (checkpoint_dir / STATE_FILE).exists()
