"""Bytes per token of a run's validation text, which make losses of different tokenizers comparable."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from litgpt_moe_ext.data.pipeline.preparation import only_finished
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.recipes import Recipe


def validated_on(recipe: Recipe) -> tuple[Any, ...]:
    """Return what determines the text of a validation, as comparable plain data."""
    settings, length = recipe.settings, recipe.sequence_length
    return str(settings.data), settings.tokenizer_dir, length, settings.train.micro_batch_size, settings.eval.max_iters


def bytes_per_token(recipe: Recipe, tokenizer_dir: Path) -> float:
    """Return the mean length of the tokens that a run predicted in a validation.

    Args:
        recipe: The settings of its checkpoint.
        tokenizer_dir: The checkpoint.

    Returns:
        Bytes of UTF-8; nan if the checkpoint has no tokenizer, or the corpus or its sources have changed.
    """
    from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt
    from litgpt_moe_ext.evaluation.perplexity import bytes_of

    if not any(tokenizer_dir.glob("tokenizer.*")):
        return float("nan")
    tokenizer = open_as_litgpt(tokenizer_dir)
    # All rows together, as a row border may split a character.
    targets = [token for row in _validation(recipe, tokenizer) for token in row[row >= 0].tolist()]
    return bytes_of(targets, tokenizer) / len(targets) if targets else float("nan")


def _validation(recipe: Recipe, tokenizer: Any) -> list[torch.Tensor]:
    """Return the targets of each validation row, as LitGPT's loop sees them; empty if the text is no longer there."""
    from jsonargparse import ArgumentParser
    from litgpt.data import DataModule

    section, length = recipe.settings.data, recipe.sequence_length
    if section is None:
        return []
    parser = ArgumentParser()
    parser.add_subclass_arguments(DataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": section})).data
    path = getattr(data, "data_path", None) or getattr(data, "corpus_dir", None)
    if path is None or not Path(path).is_dir():
        return []
    data.connect(tokenizer=tokenizer, batch_size=recipe.settings.train.micro_batch_size, max_seq_length=length)
    try:
        # Do not prepare a corpus just for this page.
        with contextlib.redirect_stdout(io.StringIO()), only_finished():
            data.prepare_data()
            data.setup()
    except (OSError, SettingsError):  # such as missing sources, which should not prevent the page of finished runs
        return []
    count = validated_on(recipe)[-1]
    rows: list[torch.Tensor] = []
    for i, batch in enumerate(data.val_dataloader()):
        if i == count:
            break
        rows += list(batch[:, 1 : length + 1])
    return rows
