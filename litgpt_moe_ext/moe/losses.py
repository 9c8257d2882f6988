"""Auxiliary losses of routers, as pure functions without their weights.

Each says what it is for perfectly even load, so that weights can be compared between them.

Shape legend: T tokens, E experts, K chosen experts per token, S sequences of T / S tokens.
"""

import torch
from torch import Tensor


def load_balancing_loss(probabilities_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Return `E * sum_i f_i P_i` (Switch Transformer, arXiv:2101.03961, equations 4 to 6; there with K = 1).

    `f_i` is the share of routed tokens that expert i received and `P_i` the mean probability that the router gave it.
    Hugging Face's Mixtral divides by T instead of T * K and is K times as large.

    Args:
        probabilities_TE: Router probabilities; rows sum to 1; differentiable.
        experts_TK: Chosen experts, int64.

    Returns:
        A scalar; 1 for even load, up to E / K (K experts take all).
    """
    return sequence_balancing_loss(probabilities_TE, experts_TK, 1)


def sequence_balancing_loss(probabilities_TE: Tensor, experts_TK: Tensor, n_sequence: int) -> Tensor:
    """Return the load-balancing loss of each sequence, averaged (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).

    Args:
        probabilities_TE: Router probabilities, or scores divided by their sum; rows sum to 1; differentiable.
        experts_TK: Chosen experts, int64.
        n_sequence: Number of sequences S, each with the same number of consecutive tokens.

    Returns:
        A scalar; 1 for even load in every sequence.
    """
    n_expert = probabilities_TE.size(1)
    experts_SR = experts_TK.view(n_sequence, -1)
    shares_SE = probabilities_TE.new_zeros(n_sequence, n_expert).scatter_add_(
        1, experts_SR, probabilities_TE.new_full((), 1 / experts_SR.size(1)).expand(experts_SR.shape)
    )
    mean_SE = probabilities_TE.unflatten(0, (n_sequence, -1)).mean(dim=1)
    return n_expert * (shares_SE * mean_SE).sum(dim=1).mean()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean of `logsumexp(logits)²`, which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Returns:
        A scalar; (ln E)² if all logits are 0.
    """
    return logits_TE.logsumexp(dim=-1).square().mean()


def cv_squared(x_E: Tensor) -> Tensor:
    """Return the squared coefficient of variation, variance / mean², of a vector; 0 if all entries are equal."""
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=torch.finfo(x_E.dtype).tiny)


def importance_loss(weights_TK: Tensor, experts_TK: Tensor, n_expert: int) -> Tensor:
    """Return CV² of the summed gate values of each expert (arXiv:1701.06538, equations 6 and 7).

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
        A scalar; 0 if every expert expects the same number of tokens.
    """
    best_TK1 = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in_T1, first_out_T1 = best_TK1[:, -2:-1], best_TK1[:, -1:]
    # Without expert i, the k-th highest is the first that was left out if i was in, and the last that was in otherwise.
    threshold_TE = torch.where(noisy_TE >= last_in_T1, first_out_T1, last_in_T1)
    return cv_squared(torch.special.ndtr((clean_TE - threshold_TE) / std_TE).sum(dim=0))
