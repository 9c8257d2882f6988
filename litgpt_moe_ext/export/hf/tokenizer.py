"""The tokenizer of a checkpoint as files that `AutoTokenizer` opens."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.export.source import ends_of_texts, read_tokenizer

if TYPE_CHECKING:
    from litgpt import Tokenizer

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
    """Copy a tokenizer's files, those that there are, with what ends and begins a text and how a chat is written."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (from_dir / name).is_file():
            shutil.copyfile(from_dir / name, to_dir / name)


def export_tokenizer(checkpoint_dir: Path, out_dir: Path, vocab_size: int) -> dict[str, int | list[int]]:
    """Copy a tokenizer's files, and name a class in `tokenizer_config.json` if it names none.

    Args:
        checkpoint_dir: A checkpoint.
        out_dir: Where the files go.
        vocab_size: Rows of the model's embedding table.

    Returns:
        `eos_token_id`, `bos_token_id` and `pad_token_id`, those that are known; empty if there is no tokenizer. Where
        several tokens end a text, the first is a list.

    Raises:
        SettingsError: If the tokenizer has ids that the model has no embedding for.
    """
    tokenizer = read_tokenizer(checkpoint_dir, vocab_size)
    if tokenizer is None:
        return {}
    for name in TOKENIZER_FILES:
        if (checkpoint_dir / name).is_file():
            shutil.copyfile(checkpoint_dir / name, out_dir / name)
    _name_class(out_dir / "tokenizer_config.json", tokenizer)
    ends = ends_of_texts(checkpoint_dir, tokenizer, vocab_size)
    eos = ends if len(ends) > 1 else tokenizer.eos_id
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.eos_id}
    return {name: value for name, value in ids.items() if value is not None}


def _name_class(file: Path, tokenizer: "Tokenizer") -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fast = "PreTrainedTokenizerFast"
    if settings.setdefault("tokenizer_class", fast) != fast or tokenizer.backend != "huggingface":
        return
    # The class would also return token types, which no decoder takes.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    for name in ("bos", "eos"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None:
            token = tokenizer.processor.id_to_token(token_id)  # pyrefly: ignore[missing-attribute] (not SentencePiece's)
            settings.setdefault(f"{name}_token", token)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
