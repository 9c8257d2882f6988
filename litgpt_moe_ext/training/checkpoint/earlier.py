"""Earlier runs in the same `out_dir`: a new run moves them aside, and old ones are deleted on request."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.durable import rename
from litgpt_moe_ext.interruption import uninterrupted
from litgpt_moe_ext.training.checkpoint.progress import newest_first
from litgpt_moe_ext.training.logs import ANOMALIES_FOLDER, EXPORTS_FOLDER, METRICS_FILE, TRANSCRIPT_FILE, WIDE_FILE
from litgpt_moe_ext.wording import in_shell, quoted

_MANY = 3  # so many earlier runs are worth a message


def set_aside(out_dir: Path) -> Path | None:
    """Move checkpoints, logs and exports of an earlier run out of the way of a new one.

    Logs left in place would be read as those of an earlier part of the new run. Nothing is copied: they move to a
    directory beside `out_dir`, or inside it if that fails (`out_dir` is a mount point, or its parent is read-only).

    Returns:
        The directory that holds them now, or None if there were none.

    Raises:
        SettingsError: If they cannot be moved.
    """
    found = [directory.relative_to(out_dir) for directory in newest_first(out_dir)]
    others = (METRICS_FILE, WIDE_FILE, ANOMALIES_FOLDER, EXPORTS_FOLDER)
    found += [Path(name) for name in others if (out_dir / name).exists()]
    if (out_dir / "logs" / "csv").is_dir():  # of a run of `litgpt pretrain`
        found.append(Path("logs", "csv"))
    if not found:
        return None
    if (out_dir / TRANSCRIPT_FILE).is_file():
        found.append(Path(TRANSCRIPT_FILE))
    # Unresolved, a link would be moved aside next to itself, which may be on another disk.
    out_dir = out_dir.resolve()
    problem: OSError | None = None
    for aside in (free_name(out_dir), free_name(out_dir / "run")):
        try:
            with uninterrupted():  # never split a run over two directories
                _move(out_dir, aside, found)
        except OSError as error:
            problem = error
        else:
            return aside
    raise SettingsError(
        f"out_dir: {quoted(out_dir)} holds the checkpoints of an earlier run, which cannot be moved ({problem}); "
        "choose another --out_dir, or continue that run with --resume auto"
    )


def _move(out_dir: Path, aside: Path, names: list[Path]) -> None:
    # Move all or none.
    moved: list[Path] = []
    try:
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            rename(out_dir / name, aside / name)
            moved.append(name)
    except OSError:
        for name in reversed(moved):
            rename(aside / name, out_dir / name)
        shutil.rmtree(aside, ignore_errors=True)  # empty folders only: everything is back
        raise


def earlier_runs(out_dir: Path) -> list[Path]:
    """Return the directories that `set_aside` made for a run's directory, oldest first.

    They are ordered by the number in their name, as clocks can be wrong. Directories without a run are left out.
    """
    out_dir = out_dir.resolve()
    found = [path for name in (out_dir, out_dir / "run") for path in _numbers(name).values() if _holds_a_run(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def limit_earlier_runs(out_dir: Path, keep: int | None, needed: Sequence[Path]) -> str | None:
    """Delete the oldest earlier runs, or suggest how to; return a message, or None if there is nothing to say.

    Args:
        out_dir: The run's directory.
        keep: How many to keep; None keeps all.
        needed: Paths that this run uses; earlier runs that contain one of them stay.
    """
    runs = earlier_runs(out_dir)
    if keep is None:
        if len(runs) < _MANY:
            return None
        command = in_shell("rm", "-r", *runs[:-1])
        return (
            f"There are {len(runs)} earlier runs now. All but the last are deleted by: {command}; "
            "checkpoint.keep_earlier: 1 does so from now on."
        )
    used = [path.resolve() for path in needed]
    doomed = [run for run in runs[: max(0, len(runs) - keep)] if not any(path.is_relative_to(run) for path in used)]
    for run in doomed:
        shutil.rmtree(run, ignore_errors=True)
    left = [run for run in doomed if run.exists()]  # what may not be deleted, and links to another disk
    found = {"Deleted": [run for run in doomed if run not in left], "Could not delete": left}
    lines = [
        f"{what} the oldest earlier runs (checkpoint.keep_earlier): {', '.join(map(str, runs))}"
        for what, runs in found.items()
        if runs
    ]
    return "\n".join(lines) or None


def free_name(directory: Path) -> Path:
    """Return the next free name to set a directory aside under."""
    return directory.with_name(f"{directory.name}-earlier-{max(_numbers(directory), default=0) + 1}")


def _numbers(directory: Path) -> dict[int, Path]:
    beginning = f"{directory.name}-earlier-"
    names = ((path.name.removeprefix(beginning), path) for path in directory.parent.glob("*-earlier-*"))
    return {int(number): path for number, path in names if number.isascii() and number.isdecimal()}


def _holds_a_run(directory: Path) -> bool:
    files = (METRICS_FILE, WIDE_FILE, "logs")
    return bool(newest_first(directory)) or any((directory / name).exists() for name in files)
