"""The gradients of a router's logits, and of the logits of its noise.

Shape legend: as in `litgpt_moe_ext.moe.kernels.triton.routing.launches`.
"""

from typing import TYPE_CHECKING, Any

import triton

from litgpt_moe_ext.moe.kernels.triton.common import constexpr
from litgpt_moe_ext.moe.kernels.triton.routing.blocks import block, gate_values, margins, rank_of, softmax, text, values

if TYPE_CHECKING:
    # Triton's own types take what a reduction returns for several values.
    tl: Any = None
else:
    import triton.language as tl


@triton.jit
def route_block_backward(given, upstream, results, sizes, FORM: constexpr):
    """Store the gradients of a block of tokens."""
    experts, ends, slopes, dweights, scale = upstream
    dlogits, dspread = results
    token_T, e_E, live_T, real_E, at_TE, inside_TE = block(sizes, FORM)
    z_TE, noise_TE, std_TE, v_TE = values(given, at_TE, inside_TE, real_E)
    p_TE, lse_T = softmax(z_TE)
    s_TE = tl.sigmoid(z_TE) if FORM.score == "sigmoid" else p_TE
    scale = tl.load(scale).to(tl.float32)
    n_token = tl.maximum(tl.load(ends + sizes.n_expert - 1).to(tl.float32) / FORM.top_k, 1.0)
    rank_TE = rank_of(experts, token_T, live_T, e_E, real_E, FORM)
    picked_TE = rank_TE < FORM.top_k
    goal_TE = token_T[:, None] * FORM.top_k + rank_TE
    dw_TE = tl.load(dweights + goal_TE, mask=picked_TE, other=0.0).to(tl.float32) * FORM.scale
    if FORM.importance != 0.0:
        slope_E = tl.load(slopes + sizes.n_expert + e_E, mask=real_E, other=0.0) * scale
        dw_TE += tl.where(picked_TE, slope_E[None, :], 0.0)
    w_TE, total_T = gate_values(s_TE, v_TE, picked_TE, FORM)
    slope_E = tl.full((FORM.experts,), 0.0, tl.float32)
    if FORM.balancing != 0.0:
        slope_E += tl.load(slopes + e_E, mask=real_E, other=0.0)
    if FORM.sequence != 0.0:
        row = 3 + tl.program_id(0) // sizes.n_block
        slope_E += tl.load(slopes + row * sizes.n_expert + e_E, mask=real_E, other=0.0)
    slope_E *= scale / n_token
    if FORM.score == "chosen":
        dv_TE = w_TE * (dw_TE - tl.sum(w_TE * dw_TE, 1)[:, None])
        dz_TE = p_TE * (slope_E[None, :] - tl.sum(p_TE * slope_E[None, :], 1)[:, None])
        if given.noise_TE is not None:
            dstd_TE = tl.full(dz_TE.shape, 0.0, tl.float32)
            if FORM.load != 0.0:
                margin_TE, last_in_T, first_out_T = margins(z_TE, std_TE, v_TE, picked_TE, real_E)
                slope_E = tl.load(slopes + 2 * sizes.n_expert + e_E, mask=real_E, other=0.0) * scale
                q_TE = slope_E[None, :] * 0.3989422804014327 * tl.exp(-0.5 * margin_TE * margin_TE) / std_TE
                dz_TE += q_TE
                dstd_TE -= q_TE * margin_TE
                # The limits are noisy logits of other experts, which get gradients too.
                of_chosen_T = tl.sum(tl.where(picked_TE, q_TE, 0.0), 1)
                of_others_T = tl.sum(tl.where(picked_TE, 0.0, q_TE), 1)
                last_T = tl.argmin(tl.where(picked_TE, v_TE, float("inf")), 1)
                first_T = tl.argmax(tl.where(picked_TE, float("-inf"), v_TE), 1)
                dv_TE -= tl.where(e_E[None, :] == first_T[:, None], of_chosen_T[:, None], 0.0)
                dv_TE -= tl.where(e_E[None, :] == last_T[:, None], of_others_T[:, None], 0.0)
            dstd_TE += dv_TE * noise_TE
            spread_TE = tl.load(given.spread_TE + at_TE, mask=inside_TE, other=0.0)
            slope_TE = tl.where(spread_TE > 20.0, 1.0, tl.sigmoid(spread_TE))
            dspread_TE = tl.where(text(given, token_T, live_T)[:, None], dstd_TE * slope_TE, 0.0)
            tl.store(dspread + at_TE, dspread_TE, mask=inside_TE)
        dz_TE += dv_TE
    else:
        ds_TE = dw_TE
        if FORM.normalize:
            ds_TE = tl.where(picked_TE, (dw_TE - tl.sum(dw_TE * w_TE, 1)[:, None]) / total_T[:, None], 0.0)
        if FORM.score == "sigmoid":
            if FORM.balancing != 0.0 or FORM.sequence != 0.0:
                sum_T1 = (tl.sum(s_TE, 1) + 1e-20)[:, None]
                ds_TE += (slope_E[None, :] - tl.sum(slope_E[None, :] * s_TE, 1)[:, None] / sum_T1) / sum_T1
            dz_TE = ds_TE * s_TE * (1.0 - s_TE)
        else:
            ds_TE += slope_E[None, :]
            dz_TE = s_TE * (ds_TE - tl.sum(s_TE * ds_TE, 1)[:, None])
    if FORM.z != 0.0:
        dz_TE += (2.0 * FORM.z * scale / n_token) * lse_T[:, None] * p_TE
    # Intermediate values of padding are arbitrary.
    dz_TE = tl.where(text(given, token_T, live_T)[:, None], dz_TE, 0.0)
    tl.store(dlogits + at_TE, dz_TE, mask=inside_TE)
