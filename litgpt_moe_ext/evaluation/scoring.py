"""Log-probabilities of given tokens under a LitGPT model.

Shape legend: B batch, T tokens, V vocabulary, N tokens of a whole text.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from litgpt import GPT
from torch import Tensor

from litgpt_moe_ext.evaluation.batching import pad_right


class Continuation(NamedTuple):
    """What to score: the tokens of `continuation`, which follow at least one token of `context`."""

    context: Sequence[int]
    continuation: Sequence[int]


@torch.inference_mode()
def score_continuations(
    model: GPT, requests: Sequence[Continuation], batch_size: int, advance: Callable[[int], None]
) -> list[float]:
    """Return the sum of the log-probabilities of each continuation's tokens, in nats.

    A context that is too long for the model loses tokens on the left.

    Args:
        model: A `litgpt.GPT` in evaluation mode.
        requests: What to score.
        batch_size: Requests per forward pass.
        advance: Called with the number of requests done after each forward pass.

    Raises:
        ValueError: If a continuation is empty or longer than the model's block size.
    """
    size, device = model.max_seq_length, next(model.parameters()).device
    for context, continuation in requests:
        if not context or not 0 < len(continuation) <= size:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens after {len(context)}; it must have 1 to {size} (the "
                "model's block size) after at least 1"
            )
    # The last token is only predicted, never read.
    inputs = [[*context, *continuation][-(size + 1) : -1] for context, continuation in requests]
    scores = [0.0] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: -len(inputs[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits_BTV = model(pad_right([inputs[i] for i in batch], device))
        sums = []
        for i, logits_TV in zip(batch, logits_BTV, strict=True):
            target_T = torch.tensor(requests[i].continuation, device=device)
            stop = len(inputs[i])
            sums.append(-F.cross_entropy(logits_TV[stop - len(target_T) : stop].float(), target_T, reduction="sum"))
        for i, score in zip(batch, torch.stack(sums).tolist(), strict=True):
            scores[i] = score
        advance(len(batch))
    return scores


@torch.inference_mode()
def token_losses(model: GPT, ids_N: Tensor, batch_size: int, advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Return the loss of every token but the first, each predicted once, and how many tokens it was predicted from.

    The text is read in windows of the model's block size that share one token, as in validation during training.

    Args:
        model: A `litgpt.GPT` in evaluation mode.
        ids_N: The text, int64.
        batch_size: Windows per forward pass.
        advance: Called with the number of tokens done after each forward pass.

    Returns:
        Losses in nats, (N - 1,) float32, and context lengths, (N - 1,) int64.
    """
    size, device = model.max_seq_length, next(model.parameters()).device
    starts = range(0, len(ids_N) - 1, size)
    windows = [ids_N[start : start + size + 1] for start in starts]
    losses, contexts = [], []
    for i in range(0, len(windows), batch_size):
        batch = windows[i : i + batch_size]
        logits_BTV = model(pad_right([window[:-1].tolist() for window in batch], device))
        for window, logits_TV in zip(batch, logits_BTV, strict=True):
            target_T = window[1:].to(device)
            losses.append(F.cross_entropy(logits_TV[: len(target_T)].float(), target_T, reduction="none").cpu())
            contexts.append(torch.arange(1, len(target_T) + 1))
        advance(sum(len(window) - 1 for window in batch))
    return torch.cat(losses), torch.cat(contexts)
