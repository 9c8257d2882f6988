"""Recipes as text for people: another model in the same text, keeping the comments that still apply."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt, checked
from litgpt_moe_ext.recipe_files import load_value, read_recipe
from litgpt_moe_ext.study.twin import Equality, Experts, dense_twin, moe_twin


def twin_settings(settings: dict[str, Any], by: Equality, experts: Experts | None = None) -> dict[str, Any]:
    """Return the settings of a recipe with its model replaced by the twin.

    The twin's name and `out_dir` end in `-dense` or `-moe`, so that twins do not share checkpoints.

    Args:
        settings: A recipe with `model_config`, as plain data; not changed.
        by: The cost that must be equal.
        experts: Experts of the MoE twin; None makes a dense twin.

    Raises:
        SettingsError: If there is no such twin.
    """
    model = settings.get("model_config")
    if not isinstance(model, dict):
        raise SettingsError("model_config: the recipe must have one for its model to have a twin; write out the model")
    train = checked("train", settings.get("train") or {}, dict)
    twin = copy.deepcopy(settings)
    length = checked(
        "train.max_seq_length", train.get("max_seq_length") or model.get("block_size") or 4096, PositiveInt
    )
    made = dense_twin(model, length, by) if experts is None else moe_twin(model, length, experts, by)
    suffix = "-dense" if experts is None else "-moe"
    if made.get("name"):
        made["name"] += suffix
    twin["model_config"] = made
    if twin.get("out_dir"):
        twin["out_dir"] = f"{str(twin['out_dir']).rstrip('/')}{suffix}"
    return twin


def twin_text(recipe: Path, by: Equality, experts: Experts | None, header: Sequence[str]) -> str:
    """Return the text of a recipe's twin.

    The recipe's comments stay, except its header, which describes the other model, and those above settings that the
    twin lacks.

    Args:
        recipe: The recipe.
        by: The cost that must be equal.
        experts: As in `twin_settings`.
        header: Lines of the comment at the top of the text.

    Raises:
        SettingsError: If the file is not a recipe or has no such twin.
    """
    before, _ = read_recipe(recipe, "recipe")
    after = twin_settings(before, by, experts)
    lines = recipe.read_text(encoding="utf-8-sig").splitlines()
    document = yaml.compose("\n".join(lines), yaml.SafeLoader)
    edited = _Lines(lines)
    for key, value in _pairs(document):
        if key.value == "model_config":
            edited.change(_pairs(value), before["model_config"], after["model_config"])
        elif key.value == "out_dir":
            edited.replace(key, value, f"out_dir: {_plain(after['out_dir'])}")
    body = edited.text()
    if load_value(body) != after:  # flow style or anchors: write it anew, without comments
        body = yaml.safe_dump(after, sort_keys=False)
    comment = [f"# {line}".rstrip() for text in header for line in text.splitlines()]  # a file's name may have several
    return "\n".join((*comment, "", body.lstrip("\n")))


class _Lines:
    # Lines of a YAML text, some of which are removed and some inserted.

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines: list[str | None] = list(lines)
        for number, line in enumerate(lines):  # the header
            if not line.startswith("#"):
                break
            self._lines[number] = None
        self._own = list(self._lines)

    def change(self, pairs: Sequence[tuple[yaml.Node, yaml.Node]], old: dict[str, Any], new: dict[str, Any]) -> None:
        """Change a mapping to the values of another one; new keys are placed at `mlp_class_name`."""
        indent = pairs[0][0].start_mark.column
        added = [f"{' ' * indent}{name}: {_plain(new[name])}" for name in new if name not in old]
        for key, value in pairs:
            name = key.value
            if name not in new:
                self.remove(key, value)
            elif new[name] != old[name]:
                extra = added if name == "mlp_class_name" else []
                self._comment(key, keep=name == "name")
                self.replace(key, value, "\n".join((f"{' ' * indent}{name}: {_plain(new[name])}", *extra)))

    def replace(self, key: yaml.Node, value: yaml.Node, text: str) -> None:
        first, last = _span(key, value)
        self._lines[first : last + 1] = [text, *[None] * (last - first)]

    def remove(self, key: yaml.Node, value: yaml.Node) -> None:
        self._comment(key, keep=False)
        first, last = _span(key, value)
        self._lines[first : last + 1] = [None] * (last + 1 - first)

    def _comment(self, key: yaml.Node, keep: bool) -> None:
        number = key.start_mark.line - 1
        while not keep and number >= 0 and (self._own[number] or "").lstrip().startswith("#"):
            self._lines[number] = None
            number -= 1

    def text(self) -> str:
        return "\n".join(line for line in self._lines if line is not None) + "\n"


def _span(key: yaml.Node, value: yaml.Node) -> tuple[int, int]:
    # A block ends at the start of the line after it.
    end = value.end_mark
    return key.start_mark.line, max(key.start_mark.line, end.line - (end.column == 0))


def _pairs(node: yaml.Node | None) -> list[tuple[Any, Any]]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
