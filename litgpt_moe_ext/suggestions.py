"""What the user may have meant, as the last words of an error."""

from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the known name that is most like another, or nothing where none is like it."""
    near = _nearest(name, known)
    return "" if near is None else f"; did you mean {near}?"


def did_you_mean_recipe(path: Path) -> str:
    """Return the same for a YAML file that is not there: one beside it, or in `configs/`, with a name like it."""
    by_name = {
        file.stem: str(file)
        for folder in (Path("configs"), path.parent)
        if folder.is_dir()
        for file in sorted(folder.glob("*.yaml"))
    }
    near = _nearest(path.stem, by_name)
    return "" if near is None else f"; did you mean {by_name[near]}?"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return near[0] if near else None
