"""Which checkpoint a run resumes from: the newest whole one, or the one that was named."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from litgpt_moe_ext.training.checkpoint.progress import STATE_FILE, newest_first

_NEEDED = (WEIGHTS_FILE, CONFIG_FILE)


def problem_with(checkpoint_dir: Path, read_all: bool = True) -> str | None:
    """Return why a checkpoint directory cannot be resumed from, or None if it is whole.

    Reads every file once and compares it with its checksum. A checkpoint of plain LitGPT has none; there, those inside
    the model file are used.

    Args:
        checkpoint_dir: The directory.
        read_all: Whether the numbers in the model file are read as well.
    """
    if not checkpoint_dir.is_dir():
        return "there is no such directory"
    for name in _NEEDED:
        if not (checkpoint_dir / name).is_file():
            return f"{name} is missing"
    if (checkpoint_dir / checksums.FILE_NAME).is_file():
        return checksums.problem_with(checkpoint_dir, required=_NEEDED, archive=None if read_all else WEIGHTS_FILE)
    if (checkpoint_dir / STATE_FILE).exists():  # which only runs write that write checksums as well
        return f"{checksums.FILE_NAME} is missing"
    return _problem_inside(checkpoint_dir, read_all)


def damage_of(checkpoint_dir: Path, read_all: bool = True) -> str | None:
    """Return what is wrong with the weights of a checkpoint directory, or None; its other files may have changed.

    Args:
        checkpoint_dir: The directory.
        read_all: Whether the numbers in the model file are read as well.
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
        resume: False; `"auto"` for the newest whole checkpoint if there is one; True for the same, which must exist; or
            the path of a checkpoint directory, of its model file, or of a run's directory, whose newest is taken.
        out_dir: The run's directory.
        say: Told about every checkpoint that is passed over.
        read_all: As `problem_with`.

    Raises:
        SettingsError: If a checkpoint was asked for and there is no whole one.
    """
    if resume is False:
        return None
    if not isinstance(resume, bool) and resume != "auto":
        directory = Path(resume).parent if Path(resume).suffix == ".pth" else Path(resume)
        if not (directory / WEIGHTS_FILE).is_file() and newest_first(directory):
            return find_resume_file(True, directory, say, read_all)
        if problem := problem_with(directory, read_all):
            raise SettingsError(
                f"resume: {str(resume)!r} is not a whole checkpoint: {problem}; name another, or use --resume auto"
            )
        return directory / WEIGHTS_FILE
    damaged = []
    found = newest_first(out_dir)
    # A damaged checkpoint may no longer say where it stands in the order. These come first, so that all are named.
    for directory in sorted(found, key=_says_when):
        problem = problem_with(directory, read_all)
        if problem is None:
            return directory / WEIGHTS_FILE
        damaged.append(str(directory))
        say(f"Skipping checkpoint {directory}: {problem}")
    if damaged:
        # Starting anew here would overwrite the run that the user meant to continue.
        raise SettingsError(
            f"resume: {resume!r} found only damaged checkpoints ({', '.join(damaged)}). Move them away to start "
            "anew, or choose another --out_dir."
        )
    if resume is True:
        raise SettingsError(f"resume: true, but there is no checkpoint in out_dir: {str(out_dir)!r}; use --resume auto")
    return None


def _says_when(checkpoint_dir: Path) -> bool:
    """Return whether a checkpoint's own word about when it was saved can be trusted; plain LitGPT's has its name."""
    if (checkpoint_dir / checksums.FILE_NAME).exists():
        return checksums.problem_with(checkpoint_dir, required=(STATE_FILE,), only=STATE_FILE) is None
    return not (checkpoint_dir / STATE_FILE).exists()
