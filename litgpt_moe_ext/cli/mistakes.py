"""Explains in one line why a parser refused settings: name, value, and what would be right.

jsonargparse refuses a whole tree at once. Here each value is compared with the type of its own setting; the text of
jsonargparse's errors is not used.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import jsonargparse

from litgpt_moe_ext.cli.elsewhere import meant_by
from litgpt_moe_ext.errors import PERHAPS_OF_AN_EXTENSION, did_you_mean, nearest, one_line
from litgpt_moe_ext.field_types import NUMBERS, describe, members, refusal
from litgpt_moe_ext.recipe_files import CLASS_KEYS, beside_a_class, class_path_of

_FEW = 20
# Options that exist only as flags.
_ONLY_FLAGS = ("config", "dense_twin", "print_config")


def mistakes(tree: Mapping[str, Any], annotations: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with settings that a parser refused; nothing if every value is valid by itself.

    Args:
        tree: All given settings, as plain data.
        annotations: The types of the top-level settings.
    """
    return _Search(_accepts).keys("", tree, annotations)


def wrong_nulls(tree: Mapping[str, Any], annotations: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that must not be null but are, and sections that are not mappings; the parser accepts both.

    Args:
        tree: All given settings, as plain data.
        annotations: The types of the top-level settings.
    """
    return _Search(_is_something).keys("", tree, annotations)


def annotation_at(name: str, tree: Mapping[str, Any], annotations: Mapping[str, Any]) -> Any:
    """Return the type of a setting; None if it is unknown or free, as inside a dictionary.

    Args:
        name: Dotted name.
        tree: The settings as plain data, for the classes that they name.
        annotations: The types of the top-level settings.
    """
    known, node = annotations, tree
    *parents, last = name.removesuffix("+").split(".")
    for key in parents:
        if key not in CLASS_KEYS:
            known = _fields_inside(known.get(key), node.get(key) if isinstance(node, Mapping) else None)
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
        if isinstance(node, Mapping) and "class_path" in node:
            node = node.get("init_args") or {}
    return known.get(last)


def arguments_of(path: str) -> Mapping[str, Any]:
    """Return the types of the arguments of the class at an import path; empty if there is no such class."""
    with contextlib.suppress(ImportError, TypeError, ValueError):
        return _arguments(path)
    return {}


def _fields_inside(annotation: Any, value: Any) -> Mapping[str, Any]:
    path, inside = class_path_of(value), _inside(annotation)
    if inside.named is not None and isinstance(path, str):
        return arguments_of(path)
    return {} if inside.section is None else _hints(inside.section)


@dataclasses.dataclass(frozen=True)
class _Search:
    """Looks for mistakes in a tree of settings, and yields a message for each.

    Attributes:
        accepts: Returns whether a type accepts a value.
    """

    accepts: Callable[[Any, Any], bool]

    def keys(self, prefix: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
        for key, value in values.items():
            if key not in known:
                yield f"{prefix}{key}: no setting has this name{_suggestion(prefix, key, known, values)}"
            else:
                yield from self.value(f"{prefix}{key}", value, known[key])

    def value(self, name: str, value: Any, annotation: Any) -> Iterator[str]:
        inside = _inside(annotation)
        if annotation is Any or (value is None and (type(None) in members(annotation) or inside.named is not None)):
            return
        if isinstance(value, Mapping) and inside.entry is not None:
            for key, item in value.items():
                yield from self.value(f"{name}.{key}", item, inside.entry)
        elif isinstance(value, Mapping) and inside.section is not None:
            yield from self.keys(f"{name}.", value, _hints(inside.section))
        elif isinstance(value, (str, Mapping)) and inside.named is not None:
            yield from self.named(name, value, inside.named)
        elif isinstance(value, list) and inside.item is not None:
            for index, item in enumerate(value):
                if item is None and type(None) not in members(inside.item):  # which a class by itself may be
                    yield refusal(f"{name}.{index}", item, inside.item)
                else:
                    yield from self.value(f"{name}.{index}", item, inside.item)
        elif not self.accepts(annotation, value):
            yield refusal(name, value, annotation)

    def named(self, name: str, value: str | Mapping[str, Any], base: type) -> Iterator[str]:
        path = class_path_of(value)
        if not isinstance(path, str):
            yield f"{name}: has no class_path; it must be {describe(base)}"
            return
        arguments: Mapping[str, Any] = {}
        try:
            made = _named(path)
            why = "it is another class" if inspect.isclass(made) and not issubclass(made, base) else ""
        except (ImportError, TypeError, ValueError) as error:  # the last two from the module, as of a misspelt event
            made, why = None, f"it cannot be imported ({one_line(error)})"
            if isinstance(error, ModuleNotFoundError) and error.name and path.startswith(error.name):
                why += "; Python finds what is installed, or in a folder that PYTHONPATH names"
        if not why:
            try:
                arguments = _arguments(path)
            except (TypeError, ValueError):
                why = "it is not a class"
        if why:
            yield f"{name}.class_path: {path!r} must be the import path of a {base.__name__}; {why}{_meant(path, base)}"
            return
        if isinstance(value, Mapping):
            yield from beside_a_class(name, value)
        given = {} if isinstance(value, str) else value.get("init_args") or {}
        if isinstance(given, Mapping):
            yield from self.keys(f"{name}.", given, arguments)
            required = dict(_required(path))
            yield from (f"{name}.{key}: must be given for {path}" for key in required if key not in given)
            yield from (
                f"{name}.{key}: has no type in {path}, which its argument must say, as in `{key}: float`"
                for key, annotation in required.items()
                if annotation is inspect.Parameter.empty
            )
        else:
            yield refusal(f"{name}.init_args", given, dict)


def _meant(path: str, base: type) -> str:
    from litgpt_moe_ext import data

    # The other modules of LitGPT are known by their names alone at `data` itself, and have no place in a mixture.
    near = nearest(path, data.MODULES) if base.__name__ == "DataModule" and "." not in path else None
    return f"; did you mean {data.__name__}.{near}?" if near else ""


def _suggestion(prefix: str, key: str, known: Iterable[str], values: Mapping[str, Any]) -> str:
    if not isinstance(key, str):
        return ", which is not text; put it in quotes if it is a name"
    if (meant := meant_by(prefix, key)) is not None:
        return f"; did you mean {meant}?"
    if near := nearest(key, known):
        return f"; did you mean {prefix}{near}?"
    # As where `max_tokens` is given and `train.max_tokens` is meant.
    names = _nested_names(known, values) if isinstance(known, Mapping) else {}
    if near := nearest(key.replace("-", "_"), names, cutoff=0.75):
        return f"; did you mean {prefix}{names[near]}?"
    if not prefix and (hint := did_you_mean(key, _ONLY_FLAGS)):
        return hint
    if prefix == "model_config.":
        return PERHAPS_OF_AN_EXTENSION
    every = list(known)
    return f"; known are {', '.join(every)}" if every and (prefix or len(every) <= _FEW) else ""


def _nested_names(known: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    fields = {key: _fields_inside(annotation, values.get(key)) for key, annotation in known.items()}
    return {name: f"{key}.{name}" for key, inside in fields.items() for name in inside}


class _Inside(NamedTuple):
    """What values of a type may have inside.

    Attributes:
        section: The dataclass that keys and values are for.
        named: The class whose subclasses are named by class_path.
        item: The type of a list's items.
        entry: The type of a dictionary's values.
    """

    section: type | None = None
    named: type | None = None
    item: Any = None
    entry: Any = None


def _inside(annotation: Any) -> _Inside:
    found = _Inside()
    for kind in members(annotation):
        origin = get_origin(kind) or kind
        if origin is list:
            found = found._replace(item=(*get_args(kind), None)[0])
        elif origin is dict:
            found = found._replace(entry=(*get_args(kind), Any, Any)[1])
        elif not inspect.isclass(kind) or kind in NUMBERS or kind.__module__ == "builtins":
            continue
        elif dataclasses.is_dataclass(kind):
            found = found._replace(section=kind)
        elif not issubclass(kind, PurePath):
            found = found._replace(named=kind)
    return found


def _named(path: str) -> Any:
    """Return what is at an import path.

    Raises:
        ImportError: If there is nothing.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError("it names no module")
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(str(error)) from error


def _arguments(path: str) -> Mapping[str, Any]:
    """Return the types of the arguments of a class.

    Raises:
        ImportError: If there is nothing at this path.
        TypeError: If it cannot be called.
        ValueError: If it does not say what it takes.
    """
    cls = _named(path)
    hints = _known_hints(cls.__init__)
    return {key: hints.get(key, Any) for key in inspect.signature(cls).parameters}


def _required(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the arguments that the class at an import path has no default for, with what it says of their types."""
    for key, parameter in inspect.signature(_named(path)).parameters.items():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            yield key, parameter.annotation


@cache
def _hints(section: Any) -> dict[str, Any]:
    hints = {field.name: field.type for field in dataclasses.fields(section)}
    if any(isinstance(hint, str) for hint in hints.values()):
        known = _known_hints(section)
        hints = {name: known.get(name, Any) for name in hints}
    return hints


def _known_hints(owner: Any) -> dict[str, Any]:
    try:
        return get_type_hints(owner)
    except NameError:  # a type that only type checkers import
        return {}


def _is_something(annotation: Any, value: Any) -> bool:
    sections_only = all(dataclasses.is_dataclass(kind) or kind is type(None) for kind in members(annotation))
    return value is not None and not (sections_only and not isinstance(value, Mapping))


def _accepts(annotation: Any, value: Any) -> bool:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    try:
        parser.parse_object({"value": value})
    except jsonargparse.ArgumentError:
        return False
    return True
