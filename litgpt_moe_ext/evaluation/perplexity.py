"""Perplexity and bits per byte.

Perplexities of models with different tokenizers cannot be compared, because their tokens differ in length. Bits per
byte of the text can.
"""

import math
import sys
from dataclasses import dataclass

from litgpt import Tokenizer
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.tokenization import decode


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: Predicted tokens.
        bytes: Bytes of UTF-8 that they encode. End-of-text tokens are predicted but encode none.
        loss: Mean loss per token in nats.
        by_position: By ranges of context length, the number of tokens before the predicted one: first and last length,
            mean loss, tokens.
    """

    tokens: int
    bytes: int
    loss: float
    by_position: list[dict[str, float]]

    @property
    def perplexity(self) -> float:
        """Exp of the loss."""
        return exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of text."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def exp(loss: float) -> float:
    """Return the perplexity of a loss in nats; infinite if it exceeds any float."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else loss * math.inf


def summarize(losses_N: Tensor, contexts_N: Tensor, n_byte: int) -> Perplexity:
    """Summarise the losses of tokens.

    Args:
        losses_N: Losses in nats.
        contexts_N: Number of tokens that each was predicted from, at least 1.
        n_byte: Number of bytes that the tokens encode.

    Raises:
        SettingsError: If there is nothing to summarise.
    """
    if len(losses_N) == 0 or n_byte == 0:
        raise SettingsError(
            f"text, data: {len(losses_N)} tokens to predict and {n_byte} bytes are too few to score; give a longer text"
        )
    rows, first, longest = [], 1, int(contexts_N.max())
    while first <= longest:
        last = min(2 * first - 1, longest)
        inside_N = (contexts_N >= first) & (contexts_N <= last)
        if inside_N.any():
            mean = losses_N[inside_N].double().mean().item()
            rows.append({"first": first, "last": last, "loss": mean, "tokens": int(inside_N.sum())})
        first *= 2
    return Perplexity(len(losses_N), n_byte, losses_N.double().mean().item(), rows)


def bytes_of(ids: list[int], tokenizer: Tokenizer) -> int:
    """Return how many bytes of UTF-8 tokens encode; special tokens, and document borders, encode none.

    Args:
        ids: Token ids.
        tokenizer: The tokenizer that made them.
    """
    borders = (tokenizer.eos_id, tokenizer.bos_id)  # not every tokenizer marks these as special
    return len(decode(tokenizer, [token for token in ids if token not in borders]).encode("utf-8"))
