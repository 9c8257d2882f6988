"""Log-probabilities of given tokens under a LitGPT model.

Shape legend: B batch, T tokens, V vocabulary, N tokens of a whole text.
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from litgpt import GPT
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.batching import pad_right
from litgpt_moe_ext.evaluation.tokenization import check_ids


class Continuation(NamedTuple):
    """Tokens to score: `continuation`, which follows at least one token of `context`."""

    context: Sequence[int]
    continuation: Sequence[int]


@torch.inference_mode()
def score_batch(
    model: GPT, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[Sequence[int]]]
) -> list[list[tuple[float, bool]]]:
    """Score continuations in one forward pass, in float32 for any dtype of the weights.

    Padding on the right needs no mask, as causal attention hides it, and MoE layers route each token by itself, without
    a capacity that padding could use up. So padding only costs time.

    Args:
        model: A `litgpt.GPT` in evaluation mode.
        inputs: Contexts with their continuations, each without the last token, which is only predicted.
        targets: For each input, the continuations that end one token after it.

    Returns:
        For each input and continuation the sum of its log-probabilities in nats, and whether greedy decoding gives it.
    """
    device = next(model.parameters()).device
    logits_BTV = model(pad_right(inputs, device))
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    sums, greedy = [], []
    for tokens, logits_TV, continuations in zip(inputs, logits_BTV, targets, strict=True):
        for continuation in continuations:
            logprobs_TV = logits_TV[len(tokens) - len(continuation) : len(tokens)].log_softmax(-1, dtype=dtype)
            target_T = torch.tensor(continuation, device=device)
            sums.append(logprobs_TV.gather(-1, target_T[:, None]).sum())
            greedy.append((logprobs_TV.argmax(-1) == target_T).all())
    # One transfer from the device for the whole batch.
    scores = iter(zip(torch.stack(sums).tolist(), torch.stack(greedy).tolist(), strict=True))
    return [list(islice(scores, len(continuations))) for continuations in targets]


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
        SettingsError: If a continuation is empty or longer than the model's block size, or has a token unknown to the
            model.
    """
    size = model.max_seq_length
    check_ids(model, chain.from_iterable(chain.from_iterable(requests)))
    for _, continuation in requests:
        if not 0 < len(continuation) <= size:
            raise SettingsError(
                f"file: an ending of {len(continuation)} tokens must have 1 to {size}, the model's block size; "
                "evaluate a model of longer context, or one whose tokens are longer"
            )
    inputs = [[*context, *continuation][-(size + 1) : -1] for context, continuation in requests]
    scores = [0.0] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: -len(inputs[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = score_batch(model, [inputs[i] for i in batch], [[requests[i].continuation] for i in batch])
        for i, ((score, _),) in zip(batch, found, strict=True):
            scores[i] = score
        advance(len(batch))
    return scores


@torch.inference_mode()
def token_losses(model: GPT, ids_N: Tensor, batch_size: int, advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Return the loss of every token but the first, each predicted once, and the length of its context.

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
    losses, contexts = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]  # a text of one token predicts none
    for i in range(0, len(windows), batch_size):
        batch = windows[i : i + batch_size]
        logits_BTV = model(pad_right([window[:-1].tolist() for window in batch], device))
        for window, logits_TV in zip(batch, logits_BTV, strict=True):
            target_T = window[1:].to(device)
            losses.append(F.cross_entropy(logits_TV[: len(target_T)].float(), target_T, reduction="none").cpu())
            contexts.append(torch.arange(1, len(target_T) + 1))
        advance(sum(len(window) - 1 for window in batch))
    return torch.cat(losses), torch.cat(contexts)
