"""The recipes of `configs/`, as they are packed into the wheel.

In a checkout of the repository, which has no packed copy, they are read from `configs/` itself.
"""

import re
from functools import cache
from pathlib import Path

from litgpt_moe_ext.errors import SettingsError

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def recipes_dir() -> Path:
    """Return the folder of the recipes.

    Raises:
        SettingsError: If the installation has none.
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "configs"):
        if folder.is_dir():
            return folder
    raise SettingsError(f"recipe: this installation has no recipes in {_PACKAGE / 'recipes'}; install it again")


def recipe_names() -> list[str]:
    """Return the names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def recipe_text(name: str) -> str:
    """Return the content of a recipe."""
    return (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    paragraph = recipe_text(name).partition("\n#\n")[0]
    comment = " ".join(line.lstrip("# ") for line in paragraph.splitlines())
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0]
