"""Auxiliary losses that keep the load of experts even, as pure functions.

Shape legend: T tokens, E experts, K chosen experts per token.
"""

import torch
from torch import Tensor


def cv_squared(x_E: Tensor) -> Tensor:
    """Return the squared coefficient of variation, variance / mean², of a vector; 0 if all entries are equal."""
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=torch.finfo(x_E.dtype).tiny)


def importance_loss(weights_TK: Tensor, experts_TK: Tensor, n_expert: int) -> Tensor:
    """Return CV² of the summed gate values of each expert (arXiv:1701.06538, equations 6 and 7, without its weight).

    Args:
        weights_TK: Gate values, floating, differentiable.
        experts_TK: Chosen experts, int64.
        n_expert: Number of experts E.

    Returns:
        A scalar; 0 if every expert has the same importance, E - 1 if one has all of it.
    """
    importance_E = weights_TK.new_zeros(n_expert).index_add(0, experts_TK.flatten(), weights_TK.flatten())
    return cv_squared(importance_E)


def load_loss(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """Return CV² of a smooth estimate of the number of tokens of each expert (arXiv:1701.06538, appendix A).

    The estimate for expert i sums, over tokens, the probability that i would be among the k highest if only its own
    noise were drawn again: `Phi((clean_i - threshold_i) / std_i)`, where the threshold is the k-th highest noisy
    logit of the other experts (equations 8 to 11).

    Args:
        clean_TE: Logits without noise.
        noisy_TE: Logits with noise, by which experts were chosen.
        std_TE: Standard deviation of the noise, positive.
        top_k: Number of experts a token chooses, less than E.

    Returns:
        A scalar.
    """
    best_TK1 = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in_T1, first_out_T1 = best_TK1[:, -2:-1], best_TK1[:, -1:]
    # Without expert i, the k-th highest is the first that was left out if i was in, and the last that was in otherwise.
    threshold_TE = torch.where(noisy_TE >= last_in_T1, first_out_T1, last_in_T1)
    return cv_squared(torch.special.ndtr((clean_TE - threshold_TE) / std_TE).sum(dim=0))
