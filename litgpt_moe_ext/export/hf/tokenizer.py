"""The tokenizer of a checkpoint as files for `AutoTokenizer`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.export.litgpt_checkpoint import copy_tokenizer
from litgpt_moe_ext.export.source import ends_of_texts, read_tokenizer

if TYPE_CHECKING:
    from litgpt import Tokenizer

# The class for any `tokenizer.json`.
_FAST = "PreTrainedTokenizerFast"


def export_tokenizer(checkpoint_dir: Path, out_dir: Path, vocab_size: int) -> dict[str, int | list[int]]:
    """Copy a tokenizer's files, with a `tokenizer_config.json` that every version of transformers can read.

    Args:
        checkpoint_dir: A checkpoint.
        out_dir: Where the files go.
        vocab_size: Rows of the model's embedding table.

    Returns:
        `eos_token_id`, `bos_token_id` and `pad_token_id`, as far as they are known; empty without a tokenizer. If
        several tokens end a text, `eos_token_id` is a list.

    Raises:
        SettingsError: If the tokenizer has ids that the model has no embedding for.
    """
    tokenizer = read_tokenizer(checkpoint_dir, vocab_size)
    if tokenizer is None:
        return {}
    copy_tokenizer(checkpoint_dir, out_dir)
    _describe(out_dir / "tokenizer_config.json", tokenizer)
    ends = ends_of_texts(checkpoint_dir, tokenizer, vocab_size)
    eos = ends if len(ends) > 1 else tokenizer.eos_id
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.eos_id}
    return {name: value for name, value in ids.items() if value is not None}


def _describe(file: Path, tokenizer: "Tokenizer") -> None:
    """Write `tokenizer_config.json` so that transformers 4 and 5 open it, with a class if it names none."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = _in_words_of_both(found)
    if tokenizer.backend == "huggingface" and settings.setdefault("tokenizer_class", _FAST) == _FAST:
        # The class would also return token types, which no decoder takes.
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
        for name in ("bos", "eos"):
            token_id = getattr(tokenizer, f"{name}_id")
            if token_id is not None:
                token = tokenizer.processor.id_to_token(token_id)  # pyrefly: ignore[missing-attribute] (not SentencePiece's)
                settings.setdefault(f"{name}_token", token)
    if settings != found:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_words_of_both(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration saved by transformers 5 in the form of transformers 4, which 5 reads too."""
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = _FAST
    # In transformers 4 this entry is a dictionary with another meaning.
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or []), *extra]
    return settings
