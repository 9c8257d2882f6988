"""The recipes as files: their settings as the parser reads them, and the commands in their headers."""

import functools
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The quickstart has tests of its own.
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")


def path_of(recipe: str) -> Path:
    """Return the file of a recipe."""
    return ROOT / "configs" / f"{recipe}.yaml"


def header(recipe: str) -> list[str]:
    """Return the lines of a recipe's header, without their `#`."""
    lines = path_of(recipe).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").removeprefix(" ") for line in lines[: lines.index("")]]


def commands(recipe: str, program: str) -> list[list[str]]:
    """Return the arguments of every command in a header that starts with `uv run` and `program`."""
    text = "\n".join(line for line in header(recipe) if line.startswith("    "))
    given = shlex.split(program)
    found = [shlex.split(line)[2:] for line in text.replace("\\\n", " ").splitlines()]
    return [words[len(given) :] for words in found if words[: len(given)] == given]


@functools.cache
def values_of(recipe: str, *arguments: str) -> dict[str, Any]:
    """Return the settings of a recipe as training gets them; not to be changed."""
    from tests.settings import read_settings

    return vars(read_settings(["--config", str(path_of(recipe)), *arguments]))
