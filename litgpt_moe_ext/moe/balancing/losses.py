"""Auxiliary losses of routers, as pure functions without their weights.

Each docstring gives the value at perfectly even load, so that the weights of different losses can be compared.

If there is padding, `real_T` (bool) is false for it, its "chosen" expert is E, which does not exist, and all means are
over real tokens.

Shape legend: T tokens, E experts, K chosen experts per token, S sequences of T / S tokens.
"""

import torch
from torch import Tensor


def load_balancing_loss(probabilities_TE: Tensor, experts_TK: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return `E * sum_i f_i P_i` (Switch Transformer, arXiv:2101.03961, equations 4 to 6; there with K = 1).

    `f_i` is the share of routed tokens that expert i received and `P_i` the mean probability that the router gave it.
    Hugging Face's Mixtral divides by T instead of T * K and pools the tokens of all layers; here the losses of the
    layers are summed. With L equally loaded layers, theirs is K times the loss of one layer and K / L times the sum.

    Here both factors are taken over a micro-batch. With `router_load_balancing_loss_scope: global_batch`, `f_i` is
    taken over all ranks and the accumulated micro-batches so far (arXiv:2501.11873), by
    `litgpt_moe_ext.moe.balancing.step_shares`; the gradient is still `E * f_i` for each `P_i`.

    Args:
        probabilities_TE: Router probabilities; rows sum to 1; differentiable.
        experts_TK: Chosen experts, int64.
        real_T: Which tokens are not padding; None if all.

    Returns:
        A scalar; 1 for even load, up to E / K (K experts take all).
    """
    return sequence_balancing_loss(probabilities_TE, experts_TK, 1, real_T)


def sequence_balancing_loss(
    probabilities_TE: Tensor, experts_TK: Tensor, n_sequence: int, real_T: Tensor | None = None
) -> Tensor:
    """Return the load-balancing loss of each sequence, averaged (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).

    Args:
        probabilities_TE: Router probabilities, or scores divided by their sum; rows sum to 1; differentiable.
        experts_TK: Chosen experts, int64.
        n_sequence: Number of sequences S, each with the same number of consecutive tokens.
        real_T: Which tokens are not padding; None if all. Sequences are weighted by their real tokens.

    Returns:
        A scalar; 1 for even load in every sequence.
    """
    n_expert = probabilities_TE.size(1)
    experts_SR = experts_TK.view(n_sequence, -1)
    if real_T is not None:
        n_real_S1 = real_T.view(n_sequence, -1).sum(dim=1, keepdim=True)
        chosen_SR = probabilities_TE.new_ones(()).expand(experts_SR.shape)
        chosen_SE = probabilities_TE.new_zeros(n_sequence, n_expert + 1).scatter_add_(1, experts_SR, chosen_SR)[:, :-1]
        sums_SE = _masked(probabilities_TE, real_T).unflatten(0, (n_sequence, -1)).sum(dim=1)
        visits_S1 = n_real_S1 * experts_TK.size(1)
        losses_S = n_expert * (chosen_SE / visits_S1.clamp(min=1) * sums_SE / n_real_S1.clamp(min=1)).sum(dim=1)
        # Weighted by tokens, as micro-batches are, so how sequences are spread over micro-batches does not matter.
        return losses_S.dot(n_real_S1[:, 0].to(losses_S.dtype)) / n_real_S1.sum().clamp(min=1)
    shares_SE = probabilities_TE.new_zeros(n_sequence, n_expert).scatter_add_(
        1, experts_SR, probabilities_TE.new_full((), 1 / experts_SR.size(1)).expand(experts_SR.shape)
    )
    mean_SE = probabilities_TE.unflatten(0, (n_sequence, -1)).mean(dim=1)
    return n_expert * (shares_SE * mean_SE).sum(dim=1).mean()


def mean_probabilities(probabilities_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return the mean probability of each expert, (E,).

    Args:
        probabilities_TE: Router probabilities; rows sum to 1; differentiable.
        real_T: Which tokens are not padding; None if all.
    """
    if real_T is None:
        return probabilities_TE.mean(dim=0)
    return _masked(probabilities_TE, real_T).sum(dim=0) / real_T.sum().clamp(min=1)


def router_z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return the mean of `logsumexp(logits)²`, which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits_TE: Router logits.
        real_T: Which tokens are not padding; None if all.

    Returns:
        A scalar; (ln E)² if all logits are 0.
    """
    squares_T = logits_TE.logsumexp(dim=-1).square()
    if real_T is None:
        return squares_T.mean()
    return squares_T.masked_fill(~real_T, 0.0).sum() / real_T.sum().clamp(min=1)


def cv_squared(x_E: Tensor) -> Tensor:
    """Return the squared coefficient of variation, variance / mean², of a vector; 0 if all entries are equal."""
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=torch.finfo(x_E.dtype).tiny)


def importance_loss(weights_TK: Tensor, experts_TK: Tensor, n_expert: int, real_T: Tensor | None = None) -> Tensor:
    """Return CV² of the summed gate values of each expert (arXiv:1701.06538, equations 6 and 7).

    Args:
        weights_TK: Gate values, floating, differentiable.
        experts_TK: Chosen experts, int64.
        n_expert: Number of experts E.
        real_T: Which tokens are not padding; None if all.

    Returns:
        A scalar; 0 if every expert has the same importance, E - 1 if one has all of it.
    """
    none_E = weights_TK.new_zeros(n_expert if real_T is None else n_expert + 1)
    return cv_squared(none_E.index_add(0, experts_TK.flatten(), weights_TK.flatten())[:n_expert])


def load_loss(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int, real_T: Tensor | None = None) -> Tensor:
    """Return CV² of a smooth estimate of the number of tokens of each expert (arXiv:1701.06538, appendix A).

    The estimate for expert i sums, over tokens, the probability that i would be among the k highest if only its own
    noise were drawn again: `Phi((clean_i - threshold_i) / std_i)`, where the threshold is the k-th highest noisy
    logit of the other experts (equations 8 to 11).

    Args:
        clean_TE: Logits without noise.
        noisy_TE: Logits with noise, by which experts were chosen.
        std_TE: Standard deviation of the noise, positive.
        top_k: Number of experts a token chooses, less than E.
        real_T: Which tokens are not padding; None if all.

    Returns:
        A scalar; 0 if every expert expects the same number of tokens.
    """
    best_TK1 = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in_T1, first_out_T1 = best_TK1[:, -2:-1], best_TK1[:, -1:]
    # Without expert i, the k-th highest is the (k+1)-th of all if i was chosen, and the k-th of all otherwise.
    threshold_TE = torch.where(noisy_TE >= last_in_T1, first_out_T1, last_in_T1)
    among_best_TE = torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
    return cv_squared((among_best_TE if real_T is None else _masked(among_best_TE, real_T)).sum(dim=0))


def orthogonality_loss(weight_ED: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Return `sum_ij (w_i . w_j - [i = j])²` of the router's rows scaled to length 1 (ERNIE 4.5, section 3.2).

    It keeps experts from sharing a direction, so that tokens can tell them apart.

    Args:
        weight_ED: The router's weights, one row for each expert; floating, differentiable.
        real_T: Which tokens are not padding; None if all. The loss of padding alone is 0.

    Returns:
        A scalar; 0 if all rows are orthogonal, which takes E <= D; E (E - 1) if all are parallel.
    """
    rows_ED = torch.nn.functional.normalize(weight_ED.to(torch.promote_types(weight_ED.dtype, torch.float32)), dim=1)
    with torch.autocast(weight_ED.device.type, enabled=False):
        cosines_EE = rows_ED @ rows_ED.T
    loss = (cosines_EE - torch.eye(len(rows_ED), dtype=rows_ED.dtype, device=rows_ED.device)).square().sum()
    return loss if real_T is None else loss * real_T.any()


def _masked(x_TE: Tensor, real_T: Tensor) -> Tensor:
    return x_TE.masked_fill(~real_T.unsqueeze(1), 0.0)
