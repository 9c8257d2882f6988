"""The settings of a study file by the names of flags, which identify each run."""

from collections.abc import Iterable, Iterator
from typing import Any

from litgpt_moe_ext.errors import SettingsError

Group = tuple[str, dict[str, Any]]  # where settings stand in the file, and their values by name


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings by flag, from sections nested as in a recipe; settings not named keep the recipe's values.

    A class, and anything under a dotted name, is one value.
    """
    return dict(_flat(settings))


def _flat(settings: dict[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and "class_path" not in value and "." not in name:
            yield from _flat(value, f"{parents}{name}.")
        else:
            yield parents + name, value


def refuse_two_values(grid: Iterable[Group], arms: Iterable[Group]) -> None:
    """Raise SettingsError if a setting of the grid, by which runs are named, is set a second time.

    Args:
        grid: The settings of each of the grid's values and of the search.
        arms: The settings of each arm.
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
    # A class, or any value of several settings, also replaces earlier values of those settings.
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
