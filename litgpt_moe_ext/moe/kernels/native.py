"""Grouped products with `torch.nn.functional.grouped_mm`, and everything around them with ordinary operators.

torch has native grouped products for bfloat16 on compute capabilities 9.x and 10.x; elsewhere it computes group by
group and waits for the device. Rows of D and of F elements must be multiples of 16 bytes long. Sums have a fixed order;
index additions, which are atomic on a GPU, would not.

The functions have the names, arguments and results of those in `litgpt_moe_ext.moe.kernels.triton`.

Shape legend: T tokens, K chosen experts per token, E experts, R = T * K routed rows in the order of experts, D model
width, F hidden width of one expert, G width of the first projection, O and I widths of output and input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.kernels.launch import triton_works_on
from litgpt_moe_ext.moe.kernels.plan import Gates, Gradients, Mask, Outer, Plan, Product


def multiply_rows(product: Product) -> Tensor:
    """Return each row times the weights of its expert, plus its bias, (R, O) in the dtype of the rows."""
    x, weight_EOI, bias_EO, plan, gather, scatter = product
    if not plan.rows.size(0):
        return x.new_empty(0, weight_EOI.size(1))
    x_RI = x.index_select(0, _tokens(plan)) if gather else x
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=plan.ends)
    if bias_EO is not None and y_RO.is_cuda and triton_works_on(y_RO.device):
        from litgpt_moe_ext.moe.kernels.triton.biases import add_biases

        return add_biases(y_RO, bias_EO, plan, scatter)
    if bias_EO is not None:
        row_R = torch.arange(y_RO.size(0), dtype=torch.int32, device=y_RO.device)
        y_RO += bias_EO.to(y_RO.dtype).index_select(0, _expert_of_rows(plan, row_R))
    # No row is written twice, so the order of writes does not matter.
    return torch.empty_like(y_RO).index_copy_(0, plan.rows, y_RO) if scatter else y_RO


def sum_outer_products(outer: Outer, dtype: torch.dtype, total_EOI: Tensor | None = None) -> Tensor:
    """Return the sum of `left^T right` over the rows of each expert, (E, O, I) in `dtype`, added to a `total_EOI`."""
    left, right, plan, gather_left, gather_right = outer
    left = left.index_select(0, _tokens(plan)) if gather_left else left
    right = right.index_select(0, _tokens(plan)) if gather_right else right
    if not plan.rows.size(0):
        # Its strides are refused (pytorch/pytorch#192497).
        sum_EOI = left.new_zeros(plan.n_expert, left.size(1), right.size(1))
    else:
        sum_EOI = F.grouped_mm(left.t(), right, offs=plan.ends)
        if leaves_empty_groups(left.device):
            empty_E = plan.ends.diff(prepend=plan.ends.new_zeros(1)) == 0
            sum_EOI.masked_fill_(empty_E.view(-1, 1, 1), 0.0)
    return sum_EOI.to(dtype) if total_EOI is None else total_EOI.add_(sum_EOI)


def leaves_empty_groups(device: torch.device) -> bool:
    """Return whether torch's sum over no rows is arbitrary: on Blackwell and AMD it is left-over register contents.

    Reported for the B200 (pytorch/pytorch#172439, NVIDIA/cutlass#2674); on Hopper it is zero.
    """
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9


def sums_fast(outer: Outer) -> bool:
    """Return whether torch computes gradients of weights faster than Triton: on Hopper, unless they are narrow.

    Hopper's tensor cores can read both operands of this product across their rows, which Triton does at half their
    speed. Torch in turn needs a copy of the tokens in the order of experts, which costs relatively more the narrower
    the weights are. On an H200 both took the same time at a width of 512.
    """
    left, right, _, gather_left, _ = outer
    met = right.size(1) if gather_left else left.size(1)
    return (
        left.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(left.device)[0] == 9
        and left.dtype == torch.bfloat16
        and met > 512
        and left.size(1) % 8 == right.size(1) % 8 == 0
    )


def sum_rows(x: Tensor, gates_TK: Tensor | None, plan: Plan, gather: bool, dtype: torch.dtype) -> Tensor:
    """Return the sum of the rows of each expert, (E, O) in `dtype`, as a product with a column of their factors."""
    n_row = plan.rows.size(0)
    factors_R = x.new_ones(n_row) if gates_TK is None else gates_TK.flatten().index_select(0, plan.rows).to(x.dtype)
    # Several equal columns, because the length of a row must be a multiple of 16 bytes.
    columns = factors_R.unsqueeze(1).expand(-1, 16 // x.element_size()).contiguous()
    return sum_outer_products(Outer(columns, x, plan, False, gather), dtype)[:, 0].contiguous()


def activate(h_RG: Tensor, activation: Any, mask: Mask) -> Tensor:
    """Return the hidden activations, (R, F), in the dtype of `h_RG`."""
    a_RF = h_RG.new_empty(h_RG.size(0), h_RG.size(1) // (2 if activation.gated else 1))
    activation.forward_into(h_RG, a_RF)
    return _times(a_RF, mask)


def activate_backward(h_RG: Tensor, da_RF: Tensor, gates: Gates, activation: Any, mask: Mask) -> Gradients:
    """Run the backward pass of gate values, dropout and activation, recomputing the activations."""
    gates_R = gates.gates_TK.flatten().index_select(0, gates.rows_R)
    gates_R1 = gates_R.to(torch.promote_types(da_RF.dtype, torch.float32)).unsqueeze(1)
    dots_R = torch.empty_like(gates_R, dtype=torch.float32)
    dh_RG, a_RF = torch.empty_like(h_RG), torch.empty_like(da_RF)
    activation.backward_into(h_RG, _times(da_RF.clone(), mask), a_RF, dh_RG, dots_R)
    a_RF, dh_RG = (_times(a_RF, mask) * gates_R1).to(a_RF.dtype), (dh_RG * gates_R1).to(dh_RG.dtype)
    dgates_R = torch.empty_like(dots_R).index_copy_(0, gates.rows_R, dots_R)
    return Gradients(dh_RG, a_RF, dgates_R.view(gates.gates_TK.shape))


def combine(
    y_RD: Tensor, gates_TK: Tensor | None, n_token: int, dtype: torch.dtype, added_TD: Tensor | None = None
) -> Tensor:
    """Return the sum of each token's rows and `added_TD`, (T, D) in `dtype`; rows are in the order of tokens."""
    y_TKD = y_RD.view(n_token, y_RD.size(0) // max(n_token, 1), -1) if n_token else y_RD.view(0, 1, y_RD.size(1))
    if gates_TK is not None:
        y_TD = (y_TKD * gates_TK.unsqueeze(2)).sum(1)
    else:
        y_TD = y_TKD.sum(1, dtype=torch.promote_types(y_RD.dtype, torch.float32))
    return (y_TD if added_TD is None else y_TD + added_TD).to(dtype)


def _expert_of_rows(plan: Plan, row_R: Tensor) -> Tensor:
    # Rows after the last expert's are padding, and are assigned to it.
    return torch.searchsorted(plan.ends[:-1], row_R, right=True)


def _tokens(plan: Plan) -> Tensor:
    return plan.rows if plan.top_k == 1 else plan.rows.div(plan.top_k, rounding_mode="floor")


def _times(a_RF: Tensor, mask: Mask) -> Tensor:
    return a_RF if mask.keep_RF is None else a_RF.mul_(mask.keep_RF).mul_(mask.scale)
