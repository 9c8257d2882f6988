"""Activation functions of feed-forward networks, with and without a gate.

Each comes twice: as differentiable operators, and as a forward and a backward pass that write into given memory, for
the hand-written autograd of `litgpt_moe_ext.moe.kernels.cpu`.

Shape legend: N rows, F hidden width, G = 2 * F with a gate (gate above up projection), otherwise G = F.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Activation of each name, and whether it gates a second projection (arXiv:2002.05202).
_FUNCTIONS = {
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "gelu": ("gelu", False),
    "relu": ("relu", False),
    "relu2": ("relu2", False),
}


@dataclass(frozen=True)
class Activation:
    """`f(gate) * up` for a gated activation, `f(h)` for the others.

    Args:
        name: `swiglu`, `geglu`, `gelu`, `relu`, or `relu2` for the square of ReLU (arXiv:2109.08668).
        gelu_approximate: `none` or `tanh`, as in `torch.nn.functional.gelu`.
    """

    name: str
    gelu_approximate: str = "none"

    @property
    def gated(self) -> bool:
        return _FUNCTIONS[self.name][1]

    def __call__(self, h_NG: Tensor) -> Tensor:
        """Return the hidden activations, (..., F)."""
        if not self.gated:
            return self._function(h_NG)
        return self.gate(*h_NG.chunk(2, dim=-1))

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return `f(gate) * up`."""
        return self._function(gate) * up

    def forward_into(self, h_NG: Tensor, a_NF: Tensor) -> None:
        """Write the hidden activations of `h_NG` to `a_NF`. Not differentiable."""
        if not self.gated:
            self._function_into(h_NG, a_NF)
            return
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        self._function_into(gate_NF, a_NF)
        a_NF.mul_(up_NF)

    def backward_into(
        self, h_NG: Tensor, da_NF: Tensor, a_NF: Tensor, dh_NG: Tensor | None, dots_N: Tensor | None
    ) -> None:
        """Go backward through the activation, computing it again on the way.

        Args:
            h_NG: Its input.
            da_NF: Gradient of its output; overwritten.
            a_NF: Receives its output.
            dh_NG: Receives the gradient of `h_NG` unless None.
            dots_N: Receives the row sums of output times gradient unless None.
        """
        if not self.gated or dh_NG is None:
            self.forward_into(h_NG, a_NF)
            _dot_rows(a_NF, da_NF, dots_N, scratch_NF=None if self.gated else dh_NG)
            if dh_NG is not None:
                self._gradient_into(da_NF, h_NG, dh_NG)
            return
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        dgate_NF, dup_NF = dh_NG.chunk(2, dim=1)
        self._function_into(gate_NF, dup_NF)
        torch.mul(dup_NF, up_NF, out=a_NF)
        _dot_rows(a_NF, da_NF, dots_N, scratch_NF=dgate_NF)
        dup_NF.mul_(da_NF)
        self._gradient_into(da_NF.mul_(up_NF), gate_NF, dgate_NF)

    @property
    def _kind(self) -> str:
        return _FUNCTIONS[self.name][0]

    def _function(self, x: Tensor) -> Tensor:
        match self._kind:
            case "silu":
                return F.silu(x)
            case "gelu":
                return F.gelu(x, approximate=self.gelu_approximate)
            case "relu":
                return F.relu(x)
            case _:
                return F.relu(x).square()

    def _function_into(self, x: Tensor, out: Tensor) -> None:
        match self._kind:
            case "silu":
                torch.ops.aten.silu.out(x, out=out)
            case "gelu":
                torch.ops.aten.gelu.out(x, approximate=self.gelu_approximate, out=out)
            case "relu":
                torch.clamp_min(x, 0.0, out=out)
            case _:
                torch.clamp_min(x, 0.0, out=out)
                out.square_()

    def _gradient_into(self, upstream: Tensor, x: Tensor, out: Tensor) -> None:
        match self._kind:
            case "silu":
                torch.ops.aten.silu_backward.grad_input(upstream, x, grad_input=out)
            case "gelu":
                torch.ops.aten.gelu_backward.grad_input(upstream, x, approximate=self.gelu_approximate, grad_input=out)
            case "relu":
                torch.ops.aten.threshold_backward.grad_input(upstream, x, 0.0, grad_input=out)
            case _:
                torch.clamp_min(x, 0.0, out=out)
                out.mul_(upstream).mul_(2.0)


def _dot_rows(a_NF: Tensor, b_NF: Tensor, out_N: Tensor | None, scratch_NF: Tensor | None) -> None:
    if out_N is not None:
        torch.sum(torch.mul(a_NF, b_NF, out=scratch_NF), 1, dtype=out_N.dtype, out=out_N)
