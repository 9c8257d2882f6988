"""Recipes as text for people: another model in the same text, keeping the comments that still apply."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt, checked
from litgpt_moe_ext.recipe_files import load_value, read_recipe
from litgpt_moe_ext.study.twin import Equality, Experts, dense_twin, moe_twin
from litgpt_moe_ext.training.phases.checks import check_length


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
    block_size = checked("model_config.block_size", model.get("block_size") or 4096, PositiveInt)
    length = checked("train.max_seq_length", train.get("max_seq_length") or block_size, PositiveInt)
    check_length(length, block_size)
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

    The recipe's comments stay, except its header and those inside `model_config`, which describe the other model.

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
    document: Any = yaml.compose("\n".join(lines), yaml.SafeLoader)
    for key, value in reversed(document.value):  # from the end, so that the lines before keep their numbers
        if key.value in ("model_config", "out_dir"):
            anew = yaml.safe_dump({key.value: after[key.value]}, sort_keys=False).splitlines()
            lines[key.start_mark.line : _last_line(value) + 1] = anew
    body = "\n".join(itertools.dropwhile(lambda line: line.startswith("#"), lines)) + "\n"
    if load_value(body) != after:  # flow style or anchors: write all of it anew, without comments
        body = yaml.safe_dump(after, sort_keys=False)
    comment = [f"# {line}".rstrip() for text in header for line in text.splitlines()]  # a file's name may have several
    return "\n".join((*comment, "", body.lstrip("\n")))


def _last_line(node: Any) -> int:
    # A block ends where the next one begins, behind the comments between them; its last value does not.
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return node.end_mark.line
