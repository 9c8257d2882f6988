"""Routed experts on tensors without values.

The experts are the only part of a model that reads values (the number of rows of each expert). Here they allocate what
their backends allocate for any routing.

Shape legend: T tokens, K chosen experts per token, R = T * K routed rows, E experts, D model width, F hidden width of
an expert, G width of its first projection.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.routing.router import Routing


def without_values(model: nn.Module, on_gpu: bool) -> None:
    """Replace the computation of all routed experts of a model.

    Args:
        model: The model.
        on_gpu: Whether inference allocates as much as a GPU's backends at most; otherwise, and in training, as much as
            the CPU's.
    """
    from litgpt.model import LLaMAMoE

    from litgpt_moe_ext.host.flops import dense_equivalent

    for module in model.modules():
        if isinstance(module, Experts):
            module._compute = partial(_compute, module, on_gpu)
        elif isinstance(module, LLaMAMoE):
            module.forward = dense_equivalent.__get__(module)


def _compute(experts: Experts, on_gpu: bool, x_TD: Tensor, routing: Routing, added_TD: Tensor | None) -> Tensor:
    sizes = (routing.weights_TK.numel(), experts.weights.up_EGD, experts.weights.down_EDF)
    if torch.is_grad_enabled():
        weights = [weight for weight in experts.weights if weight is not None]
        y_TD = _StandIn.apply(x_TD, routing.weights_TK, matmul_dtype(x_TD), *weights)
    elif on_gpu:
        return _infer_on_gpu(x_TD, *sizes)  # whose sum over a token's rows takes in what is added
    else:
        y_TD = _infer_on_cpu(x_TD, *sizes)
    return y_TD if added_TD is None else y_TD + added_TD


def _infer_on_cpu(x_TD: Tensor, n_row: int, up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Allocate what `litgpt_moe_ext.moe.kernels.cpu` allocates without gradients, for even routing."""
    n_expert, width, n_hidden = down_EDF.shape
    _rows_2R = x_TD.new_empty(2 * n_row, dtype=torch.int64)
    _y_RD = x_TD.new_empty(n_row, width)
    # One expert at a time: its rows, the output of its first projection, and its activations.
    n_row_of_one = -(-n_row // n_expert)
    _scratch_NW = x_TD.new_empty(n_row_of_one, width + n_hidden)
    h_NG = x_TD.new_empty(n_row_of_one, up_EGD.size(1))
    del h_NG
    return torch.empty_like(x_TD)


def _infer_on_gpu(x_TD: Tensor, n_row: int, up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Allocate what `litgpt_moe_ext.moe.kernels.grouped` allocates without gradients, by torch's grouped products.

    Triton's products write rows directly in the order of tokens, and save one copy of the outputs.
    """
    width, n_hidden = down_EDF.shape[1:]
    _rows_R = x_TD.new_empty(n_row, dtype=torch.int64)
    _h_RG = x_TD.new_empty(n_row, up_EGD.size(1))
    _a_RF = x_TD.new_empty(n_row, n_hidden)
    _y_2RD = x_TD.new_empty(2 * n_row, width)
    return torch.empty_like(x_TD)


class _StandIn(torch.autograd.Function):
    """Keep and allocate what `litgpt_moe_ext.moe.kernels.cpu` keeps and allocates, for any routing."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        up_EGD = weights[0]
        n_row = weights_TK.numel()
        h_RG = x_TD.new_empty(n_row, up_EGD.size(1), dtype=dtype)
        rows_2R = weights_TK.new_empty(2 * n_row, dtype=torch.int64)
        y_RD = x_TD.new_empty(n_row, x_TD.size(1))
        ctx.save_for_backward(x_TD.to(dtype), weights_TK, h_RG, rows_2R, *weights)
        ctx.x_dtype = x_TD.dtype
        return torch.empty_like(y_RD[: len(x_TD)])

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override] as torch's own
        x_TD, weights_TK, h_RG, _rows_2R, *weights = ctx.saved_tensors
        dweights = [torch.empty_like(weight) for weight in weights]
        _dx_RD = x_TD.new_empty(weights_TK.numel(), x_TD.size(1), dtype=ctx.x_dtype)
        # The need of one expert at a time: rows of x and dy, dh, and two of the hidden width.
        down_EDF = [weight for weight in weights if weight.dim() == 3][-1]
        width = 2 * x_TD.size(1) + h_RG.size(1) + 2 * down_EDF.size(2)
        _scratch_NW = x_TD.new_empty(weights_TK.numel() // down_EDF.size(0), width)
        return torch.empty_like(x_TD, dtype=ctx.x_dtype), torch.empty_like(weights_TK), None, *dweights
