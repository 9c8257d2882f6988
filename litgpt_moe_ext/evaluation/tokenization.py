"""Text to token ids and back with a `litgpt.Tokenizer`, without adding special tokens.

`Tokenizer.encode` would add them and strip them again.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from litgpt import GPT, Tokenizer

from litgpt_moe_ext.errors import SettingsError, undecoded
from litgpt_moe_ext.wording import quoted


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return a function from text to token ids; it raises SettingsError for undecodable bytes."""
    # Hugging Face's or SentencePiece's.
    processor: Any = tokenizer.processor

    def encode(text: str) -> list[int]:
        try:
            if tokenizer.backend == "huggingface":
                return processor.encode(text, add_special_tokens=False).ids
            return processor.encode(text)
        except (TypeError, UnicodeEncodeError) as error:  # from a command line, or half a surrogate pair in JSON
            remedy = undecoded(text) or "write it in UTF-8"
            raise SettingsError(f"text: {text[:40]!r} is not Unicode ({error}): {remedy}") from error

    return encode


def decode(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Return the text of token ids.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids.
        skip_special_tokens: Whether to leave out special tokens; SentencePiece always does.
    """
    processor: Any = tokenizer.processor
    if tokenizer.backend == "huggingface":
        return processor.decode(list(ids), skip_special_tokens=skip_special_tokens)
    return processor.decode(list(ids))


def check_ids(model: GPT, ids: Iterable[int], data: Path | None = None) -> None:
    """Raise SettingsError if a model has no embedding for a token.

    Args:
        model: The model.
        ids: Token ids.
        data: Where the ids come from; None for a text encoded with the checkpoint's tokenizer.
    """
    size, highest = model.config.padded_vocab_size or 0, max(ids, default=-1)
    if highest < size:
        return
    beyond = f"has token id {highest}, beyond the model's padded_vocab_size: {size}"
    if data is not None:
        raise SettingsError(f"data: {quoted(data)} {beyond}; name data that was made with the checkpoint's tokenizer")
    raise SettingsError(f"checkpoint_dir: its tokenizer {beyond}; copy that of the training data there")
