"""The user's recipes and flags, merged into one tree of plain data, and where each value was given.

Flags override recipes and later recipes override earlier ones, regardless of the order of flags and recipes on the
command line. A name such as `data.vocab_size` refers to a class's `init_args`, which may also be written out.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import SettingsError, undecoded
from litgpt_moe_ext.field_types import members
from litgpt_moe_ext.recipe_files import CLASS_KEYS, class_path_of, is_trusted, load_value, names_file, read_recipe


class Given:
    """Settings as plain data.

    Attributes:
        tree: Nested values by key.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        self.tree: dict[str, Any] = dict(defaults or {})
        self._places: dict[str, str] = {}
        self._flags: list[str] = []

    def add_recipe(self, file: Path, setting: str = "--config") -> None:
        """Merge a YAML file over what was given before.

        Args:
            file: The recipe.
            setting: The setting that named it, for errors.

        Raises:
            SettingsError: If it is not a recipe.
        """
        settings, lines = read_recipe(file, setting)
        self.tree = _merged(self.tree, settings)
        # The place of a class is that of its name, not of its arguments.
        named = {_short(name): line for name, line in lines.items() if not name.endswith(".init_args")}
        self._places |= {name: f"{file}:{line}" for name, line in named.items()}

    def add_flag(self, name: str, value: Any) -> None:
        """Set one value, overriding everything given before; a section is merged, as in LitGPT.

        Args:
            name: Dotted name, with `+` at its end to append to a list.
            value: The value as plain data.
        """
        *parents, last = name.removesuffix("+").split(".")
        node = self.tree
        for key in parents:
            node = _child(node, key)
        node = _inside(node, last)
        before = node.get(last)
        if name.endswith("+"):
            value = [*(before if isinstance(before, list) else []), value]
        elif not parents and _is_section(before) and _is_section(value):
            value = _merged(before, value)
        node[last] = value
        self._flags.append(_short(name.removesuffix("+")))

    def add_text(self, name: str, text: str, annotations: Mapping[str, Any]) -> None:
        """Set one value as `add_flag` does, from the command line.

        If the setting may be a string, the text is one (except null), so that a run may be called 123.

        Args:
            name: As in `add_flag`.
            text: The text; YAML if the setting's type is not a string.
            annotations: The types of the top-level settings.
        """
        from litgpt_moe_ext.cli.mistakes import annotation_at

        kinds = members(annotation_at(name, self.tree, annotations))
        textual = text != "null" and (str in kinds or Path in kinds)
        self.add_flag(name, text if textual else load_value(text, f"{name}: {text!r}"))

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Within the scope, have errors give settings their full names, and the file and line where they were set."""
        try:
            yield
        except SettingsError as error:
            name = self.whole_name(error.setting)
            place = self.place_of(name)
            raise SettingsError(f"{name}{str(error)[len(error.setting) :]}{place and f' ({place})'}") from error

    def whole_name(self, setting: str) -> str:
        """Return the user's full name of a data setting, as data modules' errors name only their own settings.

        Args:
            setting: Its name, or the end of it; for a mixture's corpus also the name it would have alone.
        """
        given, end = list(_names(self.tree)), setting.removeprefix("data.")
        of_data = [name for name in given if name.startswith("data.") and name.endswith(f".{end}")]
        if setting in given or len(of_data) > 1:
            return setting
        return of_data[0] if of_data else f"data.{setting}" if setting in self._arguments_of_data() else setting

    def _arguments_of_data(self) -> Collection[str]:
        # Including settings that are not given, unless the run has a setting of the same name.
        from litgpt_moe_ext.cli.mistakes import arguments_of
        from litgpt_moe_ext.training.settings import Settings

        path = class_path_of(self.tree.get("data"))
        if not isinstance(path, str) or not is_trusted(path):
            return ()
        return set(arguments_of(path)) - set(Settings.__dataclass_fields__)

    def place_of(self, setting: str) -> str:
        """Return where a setting, or a section around it, was given, as `FILE:LINE`; empty if in no file.

        Args:
            setting: Its name, or the end of it, as classes name their own arguments in errors.
        """
        setting = _short(setting)
        if any(f".{setting}." in f".{flag}." or f".{flag}." in f".{setting}." for flag in self._flags):
            return ""
        there = set(_names(self.tree))
        for name in (setting, *_parents(setting)):
            for key, place in self._places.items():
                if key in there and f".{key}".endswith(f".{name}"):
                    return place
        return ""


def read_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of every `--NAME VALUE` or `--NAME=VALUE`.

    Raises:
        SettingsError: If an argument is no flag, a value is missing, or Python could not decode it.
    """
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or not all(argument[2:].partition("=")[0].split(".")):
            if argument.startswith("-") and not argument.startswith("--") and len(argument) > 2:
                raise SettingsError(f"{argument!r} must be a flag, --NAME VALUE; did you mean -{argument}?")
            model = "" if names_file(argument) else f", a model of LitGPT as --model_name {argument or 'NAME'}"
            raise SettingsError(
                f"{argument!r} must be a flag, --NAME VALUE; a recipe is given as --config {argument or 'FILE'}{model}"
            )
        name, equals, value = argument[2:].partition("=")
        if not equals and (not waiting or waiting[0].startswith("--")):
            raise SettingsError(f"{name}: needs a value, --{name} VALUE")
        value = value if equals else waiting.pop(0)
        if name != "config" and (remedy := undecoded(value)):
            raise SettingsError(f"{name}: {value!r} cannot be read: {remedy}")
        yield name, value


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) and not CLASS_KEYS & value.keys()


def _merged(old: Any, new: Any) -> Any:
    # Another class has other arguments.
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if "class_path" in new and new["class_path"] != old.get("class_path"):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _child(node: dict[str, Any], key: str) -> dict[str, Any]:
    node = _inside(node, key)
    child = node.get(key)
    if isinstance(child, str):  # the path of a class
        child = {"class_path": child, "init_args": {}}
    node[key] = dict(child) if isinstance(child, Mapping) else {}
    return node[key]


def _inside(node: dict[str, Any], key: str) -> dict[str, Any]:
    if "class_path" not in node or key in CLASS_KEYS:
        return node
    node["init_args"] = dict(node.get("init_args") or {})
    return node["init_args"]


def _short(name: str) -> str:
    return name.replace(".init_args", "")


def _names(tree: Any, parent: str = "") -> Iterator[str]:
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        name = _short(f"{parent}.{key}".removeprefix("."))
        yield name
        yield from _names(value, name)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
