"""The tokenizer of a checkpoint as files that `AutoTokenizer` opens."""

import json
import shutil
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import load_tokenizer

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


def export_tokenizer(checkpoint_dir: Path, out_dir: Path, vocab_size: int) -> dict[str, int]:
    """Copy a tokenizer's files, and name a class in `tokenizer_config.json` if it names none.

    Args:
        checkpoint_dir: A checkpoint.
        out_dir: Where the files go.
        vocab_size: Rows of the model's embedding table.

    Returns:
        `eos_token_id`, `bos_token_id` and `pad_token_id`, those that are known; empty if there is no tokenizer.

    Raises:
        SettingsError: If the tokenizer has ids that the model has no embedding for.
    """
    if not any((checkpoint_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    tokenizer = load_tokenizer(checkpoint_dir)
    size = tokenizer.vocab_size
    if tokenizer.backend == "huggingface":
        vocabulary: dict[str, int] = tokenizer.processor.get_vocab(with_added_tokens=True)  # pyrefly: ignore[missing-attribute]
        size = 1 + max(vocabulary.values(), default=-1)
    if size > vocab_size:
        raise SettingsError(
            f"checkpoint_dir: the tokenizer in {str(checkpoint_dir)!r} has ids up to {size - 1}, but the model only "
            f"{vocab_size} embeddings; copy the tokenizer that it was trained with there"
        )
    for name in TOKENIZER_FILES:
        if (checkpoint_dir / name).is_file():
            shutil.copyfile(checkpoint_dir / name, out_dir / name)
    _name_class(out_dir / "tokenizer_config.json", tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    return {name: value for name, value in ids.items() if value is not None}


def _name_class(file: Path, tokenizer: Any) -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fast = "PreTrainedTokenizerFast"
    if settings.setdefault("tokenizer_class", fast) != fast or tokenizer.backend != "huggingface":
        return
    # The class would also return token types, which no decoder takes.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    for name in ("bos", "eos"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None:
            settings.setdefault(f"{name}_token", tokenizer.processor.id_to_token(token_id))
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
