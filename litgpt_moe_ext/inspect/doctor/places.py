"""Checks of the paths in a recipe: data, tokenizer, and output directory."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.durable import refusal
from litgpt_moe_ext.inspect.doctor.finding import Finding
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.recipe_files import class_path_of, is_trusted
from litgpt_moe_ext.wording import quoted


def data(recipe: Recipe, found: Sequence[Finding]) -> Iterator[Finding]:
    """Yield whether the data exist or can be prepared.

    Args:
        recipe: The recipe.
        found: Findings about its settings, which may already include problems of the data.
    """
    given: Any = recipe.settings.data
    if not given:
        yield Finding("data", "note", "the recipe names none; LitGPT's default is TinyLlama, which must exist locally")
        return
    try:
        class_path, arguments = _class_of(given)
        if recipe.checkpoint and not is_trusted(class_path):
            yield Finding("data", "note", f"{class_path}, not imported, since a checkpoint may come from anyone")
            return
        made = _imported(class_path)
    except SettingsError as error:
        if not any(other.verdict == "problem" and other.text.startswith("data") for other in found):
            yield Finding("data", "problem", str(error))
        return
    try:
        yield _places(recipe, class_path, made, arguments)
    except PermissionError as error:
        text = (
            f"data: {quoted(error.filename)} cannot be looked up ({error.strerror}); have its owner make it readable "
            "for you"
        )
        yield Finding("data", "problem", text)


def _class_of(given: Any) -> tuple[str, dict[str, Any]]:
    from litgpt_moe_ext.data import import_path

    called = class_path_of(given)
    arguments = given.get("init_args") or {} if isinstance(given, dict) else {}
    if not isinstance(called, str) or not isinstance(arguments, dict):
        raise SettingsError(f"data: {given!r} must be the name of a data module, or class_path and init_args")
    return import_path(called), arguments


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module or "litgpt.data"), name)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a path that begins with a dot
        raise SettingsError(f"data.class_path: {class_path!r} cannot be imported: {error}") from error


def _places(recipe: Recipe, class_path: str, made: Any, arguments: dict[str, Any]) -> Finding:
    # The check of settings reports values that are not strings.
    arguments = {name: value for name, value in arguments.items() if isinstance(value, str)}
    for name in ("source_path", "tokenizer_dir"):
        if (source := arguments.get(name)) is not None and not Path(source).exists():
            return Finding("data", "problem", f"data.init_args.{name}: {quoted(source)} must exist")
    path = arguments.get("data_path")
    if path is not None and not (Path(path).is_dir() and any(Path(path).iterdir())):
        if hasattr(made, "find_shards"):
            text = f"data.init_args.data_path: {quoted(path)} must be a folder of token shards"
            return Finding("data", "problem", text)
        if not recipe.checkpoint and (reason := refusal(existing(Path(path)))) is not None:
            text = (
                f"data.init_args.data_path: {quoted(path)} must be a folder in which the data can be prepared "
                f"({reason})"
            )
            return Finding("data", "problem", text)
        return Finding("data", "note", f"{class_path}; nothing in {quoted(path)} yet, the run will prepare it")
    return Finding("data", "good", class_path + (f" in {quoted(path)}" if path is not None else ""))


def tokenizer(recipe: Recipe, found: Sequence[Finding]) -> Iterator[Finding]:
    """Yield whether the tokenizer opens and fits the model.

    Args:
        recipe: The recipe.
        found: Findings about its settings and its data, which may have their own tokenizer.
    """
    from litgpt_moe_ext.training.phases.inputs import open_tokenizer

    directory = recipe.settings.tokenizer_dir
    if directory is None:
        # The settings or the data may already have a problem with the tokenizer.
        if not any(finding.verdict == "problem" and finding.topic in ("settings", "data") for finding in found):
            yield Finding("tokenizer", "good", "the data's own, if any")
    elif directory.is_dir():  # otherwise the check of settings reports it
        try:
            open_tokenizer(directory, recipe.config.padded_vocab_size or 0)
        except (OSError, ValueError) as error:
            yield Finding("tokenizer", "problem", str(error))
        else:
            yield Finding("tokenizer", "good", f"{directory} opens and fits the vocabulary")


def out_dir(recipe: Recipe) -> Iterator[Finding]:
    """Yield what keeps a run from writing to the recipe's output directory."""
    from litgpt_moe_ext.training.phases.inputs import check_own

    out_dir = recipe.settings.out_dir
    try:
        check_own(out_dir)
    except SettingsError as error:
        yield Finding("out_dir", "problem", str(error))
    if (reason := refusal(existing(out_dir))) is not None:
        text = f"out_dir: {quoted(out_dir)} must be a directory in which directories can be made ({reason})"
        yield Finding("out_dir", "problem", f"{text}; choose another --out_dir")


def existing(path: Path, is_there: Callable[[Path], bool] = os.path.lexists) -> Path:
    """Return a path if it exists (a dangling link does), or else its innermost existing parent."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if is_there(place))
