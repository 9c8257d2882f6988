"""Study files: arms, a grid and seeds, which together name every run."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litgpt_moe_ext.cli.recipes import recipe_names, recipes_dir
from litgpt_moe_ext.errors import SettingsError, did_you_mean_recipe
from litgpt_moe_ext.recipe_files import read_recipe
from litgpt_moe_ext.study.names import Group, by_name, refuse_two_values
from litgpt_moe_ext.study.plan import Run, Study
from litgpt_moe_ext.study.search import searched_points
from litgpt_moe_ext.wording import quoted

_KEYS = ("question", "recipe", "seeds", "settings", "arms", "grid", "search", "compare", "control")
_SCALE_KEYS = ("settings", "grid")
# Settings that a study itself sets for its runs.
_OF_THE_STUDY = {
    "seed": "seeds has those of all runs",
    "out_dir": "each run has a folder of its own in that of the study",
    "resume": "each run goes on by itself where it was",
}


def load_study(path: Path, scale: Path | None = None) -> Study:
    """Read a study file.

    Args:
        path: The study.
        scale: A YAML file with `settings`, which are added to the study's, and `grid`, whose values replace those in
            the study's grid; the arms stay the same.

    Raises:
        SettingsError: If a file is not what it should be.
    """
    content, name = _scaled(path, scale)
    arms, seeds = _arms(content), _seeds(content)
    common = by_name(_mapping(content, "settings"))
    grid = {name: _choices(name, values) for name, values in _mapping(content, "grid").items()}
    searched = searched_points(_mapping(content, "search"))
    of_arms = [(f"arms.{arm}", own) for arm, own in arms.items()]
    of_grid = [(f"grid.{name}", some) for name, values in grid.items() for _, some in values]
    of_grid.append(("search", searched[0]))
    _refuse_those_of_the_study([("settings", common), *of_arms, *of_grid])
    refuse_two_values(of_grid, of_arms)
    runs = []
    for chosen, found in itertools.product(itertools.product(*grid.values()), searched):
        point = dict(zip(grid, (shown for shown, _ in chosen), strict=True)) | found
        here = {name: value for _, some in chosen for name, value in some.items()} | found
        for seed, (arm, own) in itertools.product(seeds, arms.items()):
            settings = {**common, **here, **own}
            recipe = _recipe(str(settings.pop("recipe", content.get("recipe", "quickstart"))), path)
            runs.append(Run(arm, point, seed, recipe, settings))
    _refuse_repeated(runs)
    question, compare, control = str(content.get("question", "")), _compare(content, arms), _control(content, arms)
    return Study(name, question, runs, compare, control, tuple(searched[0]))


def _scaled(path: Path, scale: Path | None) -> tuple[dict[str, Any], str]:
    # The content of a study file at a scale, and the study's name there.
    content = _content(path, "study", _KEYS)
    if scale is None:
        return content, path.stem
    larger = _content(scale, "scale", _SCALE_KEYS)
    content["settings"] = by_name(_mapping(content, "settings")) | by_name(_mapping(larger, "settings"))
    grid = _mapping(larger, "grid")
    content["grid"] = {name: grid.get(name, values) for name, values in _mapping(content, "grid").items()}
    return content, f"{path.stem}-{scale.stem}"


def _seeds(content: dict[str, Any]) -> list[int]:
    seeds = content.get("seeds", [1, 2, 3])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise SettingsError(f"seeds: {seeds} must be a list of integers, as [1, 2, 3]")
    return seeds


def _arms(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    arms = _mapping(content, "arms") or {"recipe": {}}
    for name, settings in arms.items():
        if settings is not None and not isinstance(settings, dict):
            raise SettingsError(f"arms.{name}: {settings} must hold settings, NAME: VALUE")
    return {name: by_name(settings or {}) for name, settings in arms.items()}


def _compare(content: dict[str, Any], arms: dict[str, Any]) -> dict[str, str]:
    compare = _mapping(content, "compare")
    two = set(compare) == {"moe", "dense"} and compare["moe"] != compare["dense"]
    if compare and not (two and all(arm in list(arms) for arm in compare.values())):
        raise SettingsError(f"compare: {compare} must name two arms, as {{moe: ARM, dense: ARM}}")
    return compare


def _control(content: dict[str, Any], arms: dict[str, Any]) -> str:
    control = content.get("control", next(iter(arms)))
    if control not in list(arms):
        raise SettingsError(f"control: {control} must be one of the arms: {', '.join(arms)}")
    return control


def _refuse_those_of_the_study(groups: Iterable[Group]) -> None:
    for where, settings in groups:
        for name in _OF_THE_STUDY.keys() & settings.keys():
            raise SettingsError(f"{where}: {name} would have no effect: {_OF_THE_STUDY[name]}; leave it out")


def _refuse_repeated(runs: list[Run]) -> None:
    times = Counter(run.title for run in runs)
    if repeated := [title for title in times if times[title] > 1]:  # would look like two runs that agree
        raise SettingsError(f"seeds, grid: {repeated[0]!r} occurs twice; remove one of them")
    trained: dict[str, Run] = {}
    for run in runs:
        if (same := trained.setdefault(run.key, run)) is not run:
            raise SettingsError(f"arms, grid: {same.title!r} and {run.title!r} have the same settings; leave out one")


def _content(path: Path, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        usual = "studies/scale" if what == "scale" else "studies"
        hint = did_you_mean_recipe(path, usual) or f", like those in {usual}/"
        raise SettingsError(f"{what}: {quoted(path)} must be a {what} (YAML file){hint}")
    content, _ = read_recipe(path, what)
    if unknown := [key for key in content if key not in keys]:
        raise SettingsError(f"{what}: {path} has the key {unknown[0]}; known are {', '.join(keys)}")
    return content


def _choices(name: str, values: Any) -> list[tuple[Any, dict[str, Any]]]:
    # Each value's name in the grid, and the settings that it stands for.
    if isinstance(values, list) and values:
        return [(value, {name: value}) for value in values]
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        return [(called, by_name(some)) for called, some in values.items()]
    raise SettingsError(
        f"grid.{name}: {values} must be a list of values, or settings by name, NAME: {{SETTING: VALUE}}"
    )


def _mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise SettingsError(f"{key}: {value} must hold settings, NAME: VALUE")
    return value


def _recipe(name: str, study: Path) -> Path:
    for candidate in (Path(name), study.parent / name):
        if os.path.isfile(candidate):  # pathlib raises for a name that is too long
            return candidate
    if name.removesuffix(".yaml") in recipe_names():
        return recipes_dir() / f"{name.removesuffix('.yaml')}.yaml"
    raise SettingsError(f"recipe: {name!r} must be a recipe (YAML file) or one of {', '.join(recipe_names())}")
