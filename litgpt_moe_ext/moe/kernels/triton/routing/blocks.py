"""A router's arithmetic for a block of tokens: the functions that its kernels are built from.

Shape legend: T tokens of a block, E experts, K chosen experts per token.
"""

from typing import TYPE_CHECKING, Any

import triton

from litgpt_moe_ext.moe.kernels.triton.common import constexpr

if TYPE_CHECKING:
    # Triton's own types take what a reduction returns for several values.
    tl: Any = None
else:
    import triton.language as tl

# Numbers of a block are kept in rows of E: tokens, probabilities, gate values and expected tokens of each expert, and
# one row of sums that are not by expert.
ROWS = tl.constexpr(5)


@triton.jit
def block(sizes, FORM: constexpr):
    """Return the tokens and experts of the program, which of each exist, their positions, and which of these exist."""
    sequence = tl.program_id(0) // sizes.n_block
    token_T = (tl.program_id(0) - sequence * sizes.n_block) * FORM.rows + tl.arange(0, FORM.rows)
    e_E = tl.arange(0, FORM.experts)
    live_T, real_E = token_T < sizes.n_token, e_E < sizes.n_expert
    token_T = sequence.to(tl.int64) * sizes.n_token + token_T
    at_TE = token_T[:, None] * sizes.n_expert + e_E[None, :]
    return token_T, e_E, live_T, real_E, at_TE, live_T[:, None] & real_E[None, :]


@triton.jit
def text(given, token_T, live_T):
    """Return which tokens are not padding."""
    if given.real_T is None:
        return live_T
    else:
        return live_T & (tl.load(given.real_T + token_T, mask=live_T, other=0) != 0)


@triton.jit
def _softplus(x):
    # log1p by Kahan's formula, which keeps small results exact; linear from the same threshold as torch's. On a GPU,
    # `minimum` would replace NaN by 20.
    y = tl.exp(tl.where(x > 20.0, 20.0, x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def values(given, at_TE, inside_TE, real_E):
    """Return logits, minus infinity for experts that do not exist, noise, its standard deviation, and noisy logits."""
    z_TE = tl.load(given.logits_TE + at_TE, mask=inside_TE, other=0.0)
    z_TE = tl.where(real_E[None, :], z_TE, float("-inf"))
    if given.noise_TE is None:
        return z_TE, z_TE, z_TE, z_TE
    else:
        noise_TE = tl.load(given.noise_TE + at_TE, mask=inside_TE, other=0.0)
        std_TE = _softplus(tl.load(given.spread_TE + at_TE, mask=inside_TE, other=0.0))
        return z_TE, noise_TE, std_TE, z_TE + noise_TE * std_TE


@triton.jit
def softmax(z_TE):
    """Return the softmax of each row, and the logarithm of the sum that it divides by."""
    top_T = tl.max(z_TE, 1)
    part_TE = tl.exp(z_TE - top_T[:, None])
    sum_T = tl.sum(part_TE, 1)
    return part_TE / sum_T[:, None], top_T + tl.log(sum_T)


@triton.jit
def gate_values(s_TE, v_TE, picked_TE, FORM: constexpr):
    """Return unscaled gate values, 0 for experts that are not chosen, and the divisor of the scores."""
    if FORM.score == "chosen":
        top_T = tl.max(tl.where(picked_TE, v_TE, float("-inf")), 1)
        w_TE = tl.where(picked_TE, tl.exp(v_TE - top_T[:, None]), 0.0)
        total_T = tl.sum(w_TE, 1)
    else:
        w_TE = tl.where(picked_TE, s_TE, 0.0)
        total_T = tl.sum(w_TE, 1) + 1e-20 if FORM.normalize else tl.full((FORM.rows,), 1.0, tl.float32)
    return w_TE / total_T[:, None], total_T


@triton.jit
def _within_best_groups(key_TE, e_E, sizes, FORM: constexpr):
    size = sizes.n_expert // FORM.groups
    group_E = e_E // size
    worth_TE = tl.full(key_TE.shape, float("-inf"), tl.float32)
    for group in range(FORM.groups):
        rest_TE = tl.where((group_E == group)[None, :], key_TE, float("-inf"))
        worth_T = tl.full((FORM.rows,), 0.0, tl.float32)
        for _ in range(FORM.best_in_group):
            worth_T += tl.max(rest_TE, 1)
            best_T = tl.argmax(rest_TE, 1)
            rest_TE = tl.where(e_E[None, :] == best_T[:, None], float("-inf"), rest_TE)
        worth_TE = tl.where((group_E == group)[None, :], worth_T[:, None], worth_TE)
    allowed_TE = tl.full(key_TE.shape, 0, tl.int32)
    for _ in range(FORM.best_groups):
        best_T = tl.argmax(worth_TE, 1) // size
        hit_TE = group_E[None, :] == best_T[:, None]
        allowed_TE = tl.where(hit_TE, 1, allowed_TE)
        worth_TE = tl.where(hit_TE, float("-inf"), worth_TE)
    # Less than every number that takes part, but more than those already chosen.
    return tl.where(allowed_TE > 0, key_TE, -3.3e38)


@triton.jit
def rank(key_TE, e_E, sizes, FORM: constexpr):
    """Return the rank of each expert among its token's choices, K for experts that are not chosen.

    Whatever the logits are, no expert is chosen twice, and none that does not exist: NaN counts as large, infinities as
    finite.
    """
    key_TE = tl.where(key_TE != key_TE, 3e38, tl.minimum(tl.maximum(key_TE, -3e38), 3e38))
    key_TE = tl.where((e_E < sizes.n_expert)[None, :], key_TE, float("-inf"))
    if FORM.groups > 1:
        key_TE = _within_best_groups(key_TE, e_E, sizes, FORM)
        key_TE = tl.where((e_E < sizes.n_expert)[None, :], key_TE, float("-inf"))
    rank_TE = tl.full(key_TE.shape, FORM.top_k, tl.int32)
    for k in range(FORM.top_k):
        hit_TE = e_E[None, :] == tl.argmax(key_TE, 1)[:, None]
        rank_TE = tl.where(hit_TE, k, rank_TE)
        key_TE = tl.where(hit_TE, float("-inf"), key_TE)
    return rank_TE


@triton.jit
def rank_of(experts, token_T, live_T, e_E, real_E, FORM: constexpr):
    """Return the result of `rank` from a decision. The expert of padding is the first that does not exist."""
    rank_TE = tl.full((FORM.rows, FORM.experts), FORM.top_k, tl.int32)
    for k in range(FORM.top_k):
        expert_T = tl.load(experts + token_T * FORM.top_k + k, mask=live_T, other=-1)
        rank_TE = tl.where((e_E[None, :] == expert_T[:, None]) & real_E[None, :], k, rank_TE)
    return rank_TE


@triton.jit
def margins(z_TE, std_TE, v_TE, picked_TE, real_E):
    """Return how many standard deviations each expert is from the other outcome, and the limits on both sides."""
    last_in_T = tl.min(tl.where(picked_TE, v_TE, float("inf")), 1)
    first_out_T = tl.max(tl.where(picked_TE, float("-inf"), v_TE), 1)
    limit_TE = tl.where(picked_TE, first_out_T[:, None], last_in_T[:, None])
    return tl.where(real_E[None, :], (z_TE - limit_TE) / std_TE, 0.0), last_in_T, first_out_T
