"""The tasks named by `--tasks`: those that lm-eval ships, and task files."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import load_yaml_config

from litgpt_moe_ext.errors import SettingsError, did_you_mean, one_line, refuse_first
from litgpt_moe_ext.evaluation.harness.names import check_names
from litgpt_moe_ext.wording import quoted

# The loaders of `datasets` for plain files. Any other `dataset_path` names a dataset with files of its own.
FILE_LOADERS = ("arrow", "csv", "json", "pandas", "parquet", "text")


def load_tasks(tasks: str) -> tuple[list[str | ConfigurableTask], TaskManager]:
    """Find the tasks of the setting `tasks`.

    Args:
        tasks: Comma separated names of tasks, groups or tags that lm-eval ships, and paths of task files.

    Returns:
        The arguments `tasks` and `task_manager` of `lm_eval.simple_evaluate`. lm-eval's own tasks are indexed only if
        one of them is named.

    Raises:
        SettingsError: If there is no name, one is unknown or given twice, or a file is missing, lacks its data or does
            not define a task.
    """
    entries = [entry.strip() for entry in tasks.split(",") if entry.strip()]
    if not entries:
        raise SettingsError(f"tasks: {tasks!r} names no task; give names or YAML files, separated by commas")
    loaded = {entry: load_task_file(Path(entry)) for entry in entries if entry.lower().endswith((".yaml", ".yml"))}
    names = [entry for entry in entries if entry not in loaded]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.task_index:
            raise SettingsError(
                f"tasks: {name!r} is unknown to lm-eval; `litgpt evaluate list` shows all names, and a file that "
                f"defines a task must end in .yaml or .yml{did_you_mean(name, manager.task_index)}"
            )
    task_names = [loaded[entry].config.task if entry in loaded else entry for entry in entries]
    for name in task_names:
        if task_names.count(name) > 1:
            raise SettingsError(f"tasks: {name!r} is given more than once; rename the task in your file (key `task`)")
    return [loaded.get(entry, entry) for entry in entries], manager


def load_task_file(path: Path) -> ConfigurableTask:
    """Build the task that a YAML file in lm-eval's format defines.

    Relative `data_files` are looked up beside the file, then in the working directory, where lm-eval looks.

    Args:
        path: The file.

    Raises:
        SettingsError: If the file or its data is missing or damaged, or it does not define a task.
    """
    if not path.is_file():
        raise SettingsError(f"tasks: the file {quoted(path)} does not exist (working directory: {Path.cwd()})")
    try:
        config = load_yaml_config(str(path.resolve()), mode="full")
    except yaml.YAMLError as error:
        raise SettingsError(f"tasks: {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise SettingsError(
            f"tasks: {path} lacks the key `task` with the task's name, for example `task: my_task`. (Of a group, list "
            "the files of its tasks.)"
        )
    if "class" in config:
        raise SettingsError(
            f"tasks: {path} defines a task by a Python class (`class`); only tasks written in YAML can be named"
        )
    config = {"metadata": {}, **config}
    check_names(config, path)
    if config.get("dataset_path") in FILE_LOADERS:
        config["dataset_kwargs"] = _locate_data(config.get("dataset_kwargs") or {}, path)
    try:
        return ConfigurableTask(config=config)
    except TypeError as error:
        raise SettingsError(f"tasks: {path} has a setting that lm-eval does not accept: {error}") from error
    except Exception as error:  # lm-eval and datasets have no type for what is wrong with a file or its data
        refuse_first(_no_cache(error))
        raise SettingsError(f"tasks: {path} cannot be used: {reason(error)}; correct it or its data") from error


def _no_cache(error: Exception) -> Iterator[str]:
    # Also plain files are copied into the cache of `datasets`, by default in the home directory.
    from datasets.config import HF_DATASETS_CACHE

    name = getattr(error, "filename", None)
    if isinstance(error, OSError) and isinstance(name, str):
        place, cache = Path(name).absolute(), Path(HF_DATASETS_CACHE).absolute()
        if place.is_relative_to(cache) or cache.is_relative_to(place):
            yield (
                f"environment: HF_HOME: {quoted(place)} cannot be written ({error.strerror}), where `datasets` keeps "
                "copies of all data; set HF_HOME to a folder that you may write to"
            )


def reason(error: Exception) -> str:
    """Return in a line why lm-eval could not load a task; `datasets` hides it in the cause."""
    first = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"{one_line(first) or 'no message'} ({type(first).__name__})"


def _locate_data(dataset_kwargs: Any, path: Path) -> dict[str, Any]:
    if not isinstance(dataset_kwargs, dict):
        raise SettingsError(f"tasks: {path}: dataset_kwargs: {dataset_kwargs!r} must be settings by name")
    given = {key: _locate(dataset_kwargs[key], path) for key in ("data_files", "data_dir") if dataset_kwargs.get(key)}
    if not given:  # `datasets` would take every file in and below the working directory
        raise SettingsError(f"tasks: {path} names no data; add it as dataset_kwargs: {{data_files: FILE}}")
    return dataset_kwargs | given


def _locate(data: Any, path: Path) -> Any:
    # `data_files` is a path or pattern, a list of them, or such values by name of the split.
    if isinstance(data, dict):
        return {split: _locate(files, path) for split, files in data.items()}
    if isinstance(data, list):
        return [_locate(file, path) for file in data]
    if not isinstance(data, str):
        raise SettingsError(f"tasks: {path} names the data {data!r}, which must be a path, or a list of paths")
    if "://" in data:
        return data
    for folder in (path.resolve().parent, Path.cwd()):
        candidate = str(folder / data)
        if glob.glob(candidate, recursive=True):
            return candidate
    raise SettingsError(
        f"tasks: {path} names the data {data!r}, which is neither in {path.resolve().parent} nor in the working "
        f"directory {Path.cwd()}"
    )
