"""The settings of a study file by the names of flags, which say what each run is."""

from collections.abc import Iterable, Iterator
from typing import Any

from litgpt_moe_ext.errors import SettingsError

Group = tuple[str, dict[str, Any]]  # where settings stand in the file, and their values by name


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings by flag, where sections are nested as in a recipe: what they do not name stays the recipe's.

    A class, and what is given under a name with dots, is one value.
    """
    return dict(_flat(settings))


def _flat(settings: dict[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and "class_path" not in value and "." not in name:
            yield from _flat(value, f"{parents}{name}.")
        else:
            yield parents + name, value


def refuse_two_values(grid: Iterable[Group], arms: Iterable[Group]) -> None:
    """Raise SettingsError if a place in the grid is not the only one to set what it sets, and by which runs are called.

    Args:
        grid: What each of its values sets, and what the search does.
        arms: What each arm sets.
    """
    varied: dict[str, str] = {}
    for where, settings in grid:
        for name, value in settings.items():
            _refuse_second(where, name, value, varied)
            varied.update({each: varied.get(each, where) for each in _all_names(name, value)})
    for where, settings in arms:
        for name, value in settings.items():
            _refuse_second(where, name, value, varied)


def _refuse_second(where: str, name: str, value: Any, varied: dict[str, str]) -> None:
    # A class, or another value of several settings, also takes the place of what was given for one of them before.
    names = set(_all_names(name, value))
    for other, first in varied.items():
        if first != where and (other in names or other.startswith(f"{_short(name)}.")):
            raise SettingsError(f"{where}: {name} would replace that of {first}; leave it out of one of them")


def _all_names(name: str, value: Any) -> Iterator[str]:
    yield _short(name)
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from _all_names(f"{name}.{key}", part)


def _short(name: str) -> str:
    return name.replace(".init_args", "")
