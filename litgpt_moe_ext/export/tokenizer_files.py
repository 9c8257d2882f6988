"""The files of a tokenizer next to a model."""

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy_tokenizer(from_dir: Path, to_dir: Path) -> None:
    """Copy a tokenizer's existing files, including those for special tokens and the chat template."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (from_dir / name).is_file():
            shutil.copyfile(from_dir / name, to_dir / name)
