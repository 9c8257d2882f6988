"""The record of a router: its sums over an optimizer step, which the backward pass adds to its tally.

Shape legend: T tokens, E experts, K chosen experts per token, N numbers of a record.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing.gradient_injection import present_scale
from litgpt_moe_ext.moe.balancing.losses import mean_probabilities
from litgpt_moe_ext.moe.balancing.step_shares import StepShares

if TYPE_CHECKING:
    from litgpt_moe_ext.moe.routing.router import Choice

# What a record holds after the tokens per expert, summed over the tokens of a step: gate values, squared logits, and
# the entropy of the scores. Then come the weighted losses, each times the number of tokens in its batch.
SUMS = ("gate", "squared_logit", "entropy")


class Counted(NamedTuple):
    """What is recorded of a batch besides the router's choice.

    Attributes:
        counts_E: Tokens per expert.
        real_T: Which tokens are not padding, bool; None if all.
        losses: Weighted auxiliary losses, in the order of the record; None for one that is known only later.
    """

    counts_E: Tensor
    real_T: Tensor | None
    losses: Sequence[Tensor | None]


class StepLoss(NamedTuple):
    """A loss over the global batch, known in the backward pass only: its shares, its weight, its index among losses."""

    shares: StepShares
    coef: float
    place: int


def count_in_backward(
    weights_TK: Tensor, leaf_N: Tensor, choice: "Choice", counted: Counted, step_loss: StepLoss | None
) -> Tensor:
    """Return gate values whose backward pass adds a batch to a tally.

    Args:
        weights_TK: Gate values.
        leaf_N: The leaf of the tally.
        choice: What was chosen.
        counted: What else is recorded.
        step_loss: A load-balancing loss over the global batch, whose gradient the backward pass adds.
    """
    scores_TE = squares = mean_E = None
    counts_E, real_T, losses = counted
    if choice.logits_TE is not None:
        logits_TE = choice.logits_TE.detach()
        scores_TE = logits_TE.softmax(dim=-1) if choice.scores_TE is None else choice.scores_TE.detach()
        if real_T is not None:
            # Zeros add nothing to either sum.
            logits_TE, scores_TE = (x_TE * real_T.unsqueeze(1) for x_TE in (logits_TE, scores_TE))
        squares = logits_TE.flatten().dot(logits_TE.flatten())
    if step_loss is not None:
        mean_E = mean_probabilities(choice.probabilities(), real_T)
    losses = [None if loss is None else loss.detach() for loss in losses]
    return _CountInBackward.apply(step_loss, weights_TK, leaf_N, mean_E, counts_E, real_T, scores_TE, squares, *losses)


class _CountInBackward(torch.autograd.Function):
    """The identity on gate values, whose backward pass adds the batch to a tally as the "gradient" of its leaf.

    It also returns the gradient of the global batch's load-balancing loss by `mean_E`, the mean probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step_loss: StepLoss | None,
        weights_TK: Tensor,
        leaf_N: Tensor,
        mean_E: Tensor | None,
        *batch: Tensor | None,
    ) -> Tensor:
        ctx.leaf_dtype, ctx.step_loss = leaf_N.dtype, step_loss
        ctx.save_for_backward(weights_TK, mean_E, *batch)
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TK,) = grads
        weights_TK, mean_E, counts_E, real_T, scores_TE, squares, *losses = ctx.saved_tensors
        dmean_E = None
        if ctx.step_loss is not None:
            shares, coef, place = ctx.step_loss
            slope_E = coef * len(mean_E) * shares.shares(counts_E).to(mean_E.dtype)
            losses = [*losses]  # which is a tuple to torch 2.11's compiler
            losses[place] = slope_E.dot(mean_E)
            dmean_E = present_scale(grad_TK) * slope_E
        n_token = len(weights_TK) if real_T is None else real_T.sum()
        gate = weights_TK.sum()
        sums = [gate]
        if scores_TE is None:
            sums += [torch.zeros_like(gate)] * 2
        else:
            probabilities_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
            sums += [squares, torch.special.entr(probabilities_TE).sum()]
        sums += [torch.zeros_like(gate) if loss is None else loss * n_token for loss in losses]
        values_N = torch.cat([counts_E.to(ctx.leaf_dtype), torch.stack(sums).to(ctx.leaf_dtype)])
        return None, grad_TK, values_N, dmean_E, *(None,) * (4 + len(losses))


def tokens_per_expert(experts_TK: Tensor, n_expert: int, real_T: Tensor | None) -> Tensor:
    """Return how many tokens chose each expert, (E,), int64.

    Args:
        experts_TK: Chosen experts; E for padding.
        n_expert: E.
        real_T: Which tokens are not padding; None if all.
    """
    # One row per token, so that a GPU's atomic additions do not queue at one address per expert. The last column is for
    # padding.
    columns = n_expert if real_T is None else n_expert + 1
    chosen_TE = experts_TK.new_zeros(len(experts_TK), columns, dtype=torch.bool).scatter_(1, experts_TK, True)
    return chosen_TE.sum(dim=0)[:n_expert]
