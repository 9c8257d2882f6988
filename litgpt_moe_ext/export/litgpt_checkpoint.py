"""A new LitGPT checkpoint: weights, configuration, and the files of a tokenizer."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.utils import incremental_save, save_config
from torch import Tensor

from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def write_checkpoint(
    folder: Path, config: "Config", weights: Iterable[tuple[str, Tensor]], tokenizer_dir: Path
) -> None:
    """Write a checkpoint into an existing folder.

    Args:
        folder: The folder.
        config: The model's configuration.
        weights: As in `save_weights`.
        tokenizer_dir: The directory of its tokenizer.
    """
    copy_tokenizer(tokenizer_dir, folder)
    save_config(config, folder)
    save_weights(weights, folder)


def copy_tokenizer(from_dir: Path, to_dir: Path) -> None:
    """Copy a tokenizer's existing files, including those for special tokens and the chat template."""
    for name in _TOKENIZER_FILES:
        if (from_dir / name).is_file():
            shutil.copyfile(from_dir / name, to_dir / name)


def save_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write weights one at a time, so that memory holds one of them and not the model.

    Args:
        weights: Names and tensors on the CPU, which may be views of others.
        folder: The directory of the checkpoint.
    """
    with incremental_save(folder / WEIGHTS_FILE) as saver:
        saver.save({name: saver.store_early(_owned(tensor)) for name, tensor in weights})


def _owned(tensor: Tensor) -> Tensor:
    # Saving writes the whole storage, which a view shares with its base.
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
