"""The gated activation of shared experts, and their sum with the routed ones, as torch operators of one launch each.

Triton computes them; `litgpt_moe_ext.moe.layer` does the same with ordinary operators.

Shape legend: T tokens, D model width, F hidden width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator
from litgpt_moe_ext.moe.kernels.plan import activation_of


class GatedSum(NamedTuple):
    """Arguments of `add_gated`: outputs of routed and shared experts, logits of a gate of the latter, and padding."""

    routed_TD: Tensor
    shared_TD: Tensor
    logits_T1: Tensor | None
    real_T: Tensor | None


class GatedSumBackward(NamedTuple):
    """Arguments of `add_gated_backward`: as in `GatedSum`, and the gradient of the sum."""

    dsum_TD: Tensor
    shared_TD: Tensor
    logits_T1: Tensor | None
    real_T: Tensor | None


class Glu(NamedTuple):
    """Arguments of `glu`.

    Attributes:
        gate: Output of the gate projection, (T, F), or, without `up_TF`, of both side by side, (T, 2F); contiguous.
        up_TF: Output of the up projection, contiguous, or None.
        activation: As in `down.Down`.
        approximate: As in `down.Down`.
    """

    gate: Tensor
    up_TF: Tensor | None
    activation: str
    approximate: str


class GluBackward(NamedTuple):
    """Arguments of `glu_backward`: the gradient of the hidden activations, and those of `Glu`."""

    da_TF: Tensor
    gate: Tensor
    up_TF: Tensor | None
    activation: str
    approximate: str


@operator("add_gated", GatedSum, lambda c: torch.empty_like(c.routed_TD))
def add_gated(call: GatedSum) -> Tensor:
    """Return `routed + shared * sigmoid(logits)`, (T, D), or the plain sum without logits; 0 for padding."""
    from litgpt_moe_ext.moe.kernels.triton import gating

    return gating.add_gated(*call)


def _empty_gated(call: GatedSumBackward) -> tuple[Tensor, Tensor, Tensor]:
    drouted_TD = dlogits_T1 = call.dsum_TD.new_empty(0)
    if call.logits_T1 is not None:
        dlogits_T1 = torch.empty_like(call.logits_T1)
        drouted_TD = drouted_TD if call.real_T is None else torch.empty_like(call.dsum_TD)
    return drouted_TD, torch.empty_like(call.shared_TD), dlogits_T1


@operator("add_gated_backward", GatedSumBackward, _empty_gated, n_result=3)
def add_gated_backward(call: GatedSumBackward) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `routed_TD`, `shared_TD` and `logits_T1`, as `triton.gating` does."""
    from litgpt_moe_ext.moe.kernels.triton import gating

    return gating.add_gated_backward(*call)


def _empty_activations(call: Glu) -> Tensor:
    n_token, width = call.gate.shape
    return call.gate.new_empty(n_token, width // 2 if call.up_TF is None else width)


@operator("glu", Glu, _empty_activations)
def glu(call: Glu) -> Tensor:
    """Return the hidden activations of a gated activation, (T, F)."""
    from litgpt_moe_ext.moe.kernels.triton import activation

    return activation.glu(call.gate, call.up_TF, activation_of(call))


def _empty_glu(call: GluBackward) -> tuple[Tensor, Tensor]:
    return torch.empty_like(call.gate), call.gate.new_empty(0) if call.up_TF is None else torch.empty_like(call.up_TF)


@operator("glu_backward", GluBackward, _empty_glu, n_result=2)
def glu_backward(call: GluBackward) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and `up_TF`; empty for an `up_TF` of None."""
    from litgpt_moe_ext.moe.kernels.triton import activation

    return activation.glu_backward(call.da_TF, call.gate, call.up_TF, activation_of(call))


def _gated_backward(call: GatedSum, _needs: Any, dsum_TD: Tensor) -> dict[str, Tensor]:
    _, shared_TD, logits_T1, real_T = call
    backward = GatedSumBackward(dsum_TD.contiguous(), shared_TD, logits_T1, real_T)
    drouted_TD, dshared_TD, dlogits_T1 = add_gated_backward(backward)
    if logits_T1 is None:
        return {"routed_TD": dshared_TD, "shared_TD": dshared_TD}
    drouted_TD = dsum_TD if real_T is None else drouted_TD
    return {"routed_TD": drouted_TD, "shared_TD": dshared_TD, "logits_T1": dlogits_T1}


def _glu_backward(call: Glu, _needs: Any, da_TF: Tensor) -> dict[str, Tensor | None]:
    dgate, dup_TF = glu_backward(GluBackward(da_TF.contiguous(), *call))
    return {"gate": dgate, "up_TF": None if call.up_TF is None else dup_TF}


add_gated.set_gradient(_gated_backward)
glu.set_gradient(_glu_backward)
