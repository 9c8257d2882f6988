"""Text to token ids and back with a `litgpt.Tokenizer`, without adding special tokens.

`Tokenizer.encode` would add them and strip them again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from litgpt import Tokenizer


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return what turns text into token ids."""
    # Hugging Face's or SentencePiece's.
    processor: Any = tokenizer.processor
    if tokenizer.backend == "huggingface":
        return lambda text: processor.encode(text, add_special_tokens=False).ids
    return processor.encode


def decode(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Return the text of token ids.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids.
        skip_special_tokens: Whether special tokens stand for nothing; SentencePiece always does so.
    """
    processor: Any = tokenizer.processor
    if tokenizer.backend == "huggingface":
        return processor.decode(list(ids), skip_special_tokens=skip_special_tokens)
    return processor.decode(list(ids))
