"""Arguments of the grouped products, the same for all implementations.

Shape legend: T tokens, K chosen experts per token, E experts, R = T * K routed rows in the order of experts, D model
width, F hidden width of one expert, G width of the first projection, O and I widths of output and input.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.moe.activations import Activation


class Plan(NamedTuple):
    """Which rows belong to which expert.

    Attributes:
        rows: For each row in the order of experts, its index among the T * K choices, int64 (R,).
        ends: Where the rows of each expert end, int32 (E,).
        n_expert: E.
        top_k: K.
    """

    rows: Any
    ends: Any
    n_expert: Any
    top_k: Any


class Product(NamedTuple):
    """Rows times the weights of their experts, and where the rows are read and written.

    Attributes:
        x: Tokens, (T, I), if `gather`; otherwise rows in the order of experts, (R, I).
        weight_EOI: Weights, any strides, in the dtype of `x`.
        bias_EO: Biases, or None.
        plan: Which rows belong to which expert.
        gather: Whether `x` has one row for each token.
        scatter: Whether the rows of the result are in the order of tokens and their K choices, not of experts.
    """

    x: Tensor
    weight_EOI: Tensor
    bias_EO: Tensor | None
    plan: Plan
    gather: bool = False
    scatter: bool = False


class Outer(NamedTuple):
    """Two matrices whose rows' outer products are summed for each expert.

    Attributes:
        left: (R, O) in the order of experts, or (T, O) if `gather_left`.
        right: (R, I) in the order of experts, or (T, I) if `gather_right`.
        plan: Which rows belong to which expert.
        gather_left: Whether `left` has one row for each token.
        gather_right: Whether `right` has one row for each token.
    """

    left: Tensor
    right: Tensor
    plan: Plan
    gather_left: bool = False
    gather_right: bool = False


class Mask(NamedTuple):
    """Which hidden activations are kept.

    Attributes:
        keep_RF: True for kept activations; None without dropout.
        scale: Factor of kept activations.
    """

    keep_RF: Any = None
    scale: Any = 1.0


class Gates(NamedTuple):
    """The gate values of routed rows.

    Attributes:
        gates_TK: Gate values, contiguous.
        rows_R: For each row in the order of experts, its index among the choices.
    """

    gates_TK: Any
    rows_R: Any


class Gradients(NamedTuple):
    """What the backward pass of an activation returns.

    Attributes:
        h_RG: Gradient of the activation's input.
        a_RF: Activations times gate values, which the gradient of the second projection needs.
        gates_TK: Sums over F of activations times their gradients, float32: the gradient of the gate values.
    """

    h_RG: Any
    a_RF: Any
    gates_TK: Any


# The kernels' names of the activations that they implement.
KINDS = {
    "swiglu": "silu", "clamped_swiglu": "clamped_silu", "geglu": "gelu", "gelu": "gelu", "relu": "relu",
    "relu2": "relu2", "identity": "identity",
}  # fmt: skip


def kind_of(activation: Any) -> str | None:
    """Return the kernels' name of an activation, or None if they do not implement it."""
    kind = KINDS.get(activation.name)
    return "gelu_tanh" if kind == "gelu" and activation.gelu_approximate == "tanh" else kind


class Identity:
    """The activation of hidden rows that have been activated already, with the methods of `Activation`."""

    name, gelu_approximate, gated = "identity", "none", False

    def forward_into(self, h_NG: Tensor, a_NF: Tensor) -> None:
        """Copy `h_NG` to `a_NF`."""
        a_NF.copy_(h_NG)

    def backward_into(self, h_NG: Tensor, da_NF: Tensor, a_NF: Tensor, dh_NG: Tensor, dots_N: Tensor) -> None:
        """Copy `h_NG` to `a_NF` and `da_NF` to `dh_NG`; write the row sums of their products to `dots_N`."""
        a_NF.copy_(h_NG)
        dh_NG.copy_(da_NF)
        dots_N.copy_((h_NG * da_NF).sum(1, dtype=dots_N.dtype))


def activation_of(call: Any) -> Any:
    """Return the activation that an operator's arguments name in `activation` and `approximate`."""
    return _activation(call.activation, call.approximate)


@functools.cache
def _activation(name: str, approximate: str) -> Any:
    return Identity() if name == "identity" else Activation(name, approximate)


def plan_of(rows_R: Tensor, ends_E: Tensor, n_token: int) -> Plan:
    """Return which rows belong to which expert, for `n_token` tokens."""
    return Plan(rows_R, ends_E, ends_E.size(0), max(rows_R.size(0) // max(n_token, 1), 1))


def sort_rows(experts_TK: Tensor, counts_E: Tensor, padded: bool = False) -> tuple[Tensor, Tensor]:
    """Sort the T * K choices by expert, keeping the order of tokens, without waiting for the device.

    Args:
        experts_TK: Chosen experts, int64.
        counts_E: Tokens per expert.
        padded: Whether there may be padding, whose expert is E.

    Returns:
        For each row in the order of experts, its index among the choices, int64 (R,), padding last; and where the rows
        of each expert end, int32 (E,).
    """
    # A radix sort makes a pass over all keys for every byte of a key.
    n_key = counts_E.size(0) + int(padded)  # compilers of symbolic sizes add no truth values
    key_dtype = torch.uint8 if n_key <= 2**8 else torch.int16 if n_key <= 2**15 else torch.int32
    rows_R = experts_TK.flatten().to(key_dtype).sort(stable=True).indices
    return rows_R, counts_E.cumsum(0, dtype=torch.int32)
