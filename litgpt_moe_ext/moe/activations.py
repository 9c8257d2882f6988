"""Activation functions of feed-forward networks, with and without a gate.

Each comes twice: as differentiable operators, and as a forward and a backward pass that write into given memory, for
the hand-written autograd of `litgpt_moe_ext.moe.kernels.cpu`. Their names are in `litgpt_moe_ext.moe.registry`.

Shape legend: N rows, F hidden width, G = 2 * F with a gate (gate above up projection), otherwise G = F.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.moe.registry import ACTIVATIONS, load

_aten = torch.ops.aten


@dataclass(frozen=True)
class Pointwise:
    """An elementwise function. `into` and `gradient_into` are optional and for speed.

    Attributes:
        function: Returns the function of `x`, differentiable.
        into: Takes `x` and `out`, and writes the function of `x` to `out`.
        gradient_into: Takes `upstream`, `x` and `out`, and writes the gradient of `x` to `out`.
    """

    function: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], object] | None = None
    gradient_into: Callable[[Tensor, Tensor, Tensor], object] | None = None

    def forward_into(self, x: Tensor, out: Tensor) -> None:
        """Write the function of `x` to `out`."""
        if self.into is not None:
            self.into(x, out)
        else:
            out.copy_(self.function(x))

    def backward_into(self, upstream: Tensor, x: Tensor, out: Tensor) -> None:
        """Write the gradient of `x` to `out`, given the gradient of the function's value, `upstream`."""
        if self.gradient_into is not None:
            self.gradient_into(upstream, x, out)
            return
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out.copy_(torch.autograd.grad(self.function(x), x, upstream)[0])


SILU = Pointwise(
    F.silu,
    lambda x, out: _aten.silu.out(x, out=out),
    lambda upstream, x, out: _aten.silu_backward.grad_input(upstream, x, grad_input=out),
)
GELU = Pointwise(
    F.gelu,
    lambda x, out: _aten.gelu.out(x, out=out),
    lambda upstream, x, out: _aten.gelu_backward.grad_input(upstream, x, grad_input=out),
)
GELU_TANH = Pointwise(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
    lambda upstream, x, out: _aten.gelu_backward.grad_input(upstream, x, approximate="tanh", grad_input=out),
)
RELU = Pointwise(
    F.relu,
    lambda x, out: torch.clamp_min(x, 0.0, out=out),
    lambda upstream, x, out: _aten.threshold_backward.grad_input(upstream, x, 0.0, grad_input=out),
)
# arXiv:2109.08668
SQUARED_RELU = Pointwise(
    lambda x: F.relu(x).square(),
    lambda x, out: torch.clamp_min(x, 0.0, out=out).square_(),
    lambda upstream, x, out: torch.clamp_min(x, 0.0, out=out).mul_(upstream).mul_(2.0),
)

# GPT-OSS clamps the gate from above, with a sigmoid steeper than SiLU's, and clamps the up projection and adds 1.
_ALPHA, _LIMIT = 1.702, 7.0


def _clamped_silu(x: Tensor) -> Tensor:
    x = x.clamp(max=_LIMIT)
    return x * torch.sigmoid(_ALPHA * x)


def _clamped_silu_gradient(upstream: Tensor, x: Tensor, out: Tensor) -> None:
    limited = x.clamp(max=_LIMIT)
    s = torch.sigmoid(_ALPHA * limited)
    slope = upstream * s + _aten.sigmoid_backward(upstream * limited, s) * _ALPHA
    out.copy_(torch.where(x <= _LIMIT, slope, 0.0))


CLAMPED_SILU = Pointwise(_clamped_silu, None, _clamped_silu_gradient)
CLAMPED_PLUS_ONE = Pointwise(
    lambda x: x.clamp(-_LIMIT, _LIMIT) + 1.0,
    None,
    lambda upstream, x, out: out.copy_(torch.where(x.abs() <= _LIMIT, upstream, 0.0)),
)


class Activation:
    """`f(gate) * up` for a gated activation, `f(h)` for the others.

    Args:
        name: A name in `litgpt_moe_ext.moe.registry.ACTIVATIONS`.
        gelu_approximate: `none` or `tanh`, as in `torch.nn.functional.gelu`.

    Attributes:
        gated: Whether there is a gate.
    """

    def __init__(self, name: str, gelu_approximate: str = "none") -> None:
        self.name, self.gelu_approximate = name, gelu_approximate
        entry = ACTIVATIONS[name]
        self.gated = entry.gated
        self._pointwise: Pointwise = load(entry.tanh if gelu_approximate == "tanh" and entry.tanh else entry.function)
        self._up: Pointwise | None = load(entry.up)

    def __reduce__(self) -> tuple:
        # The functions themselves cannot be pickled.
        return Activation, (self.name, self.gelu_approximate)

    def __call__(self, h_NG: Tensor) -> Tensor:
        """Return the hidden activations, (..., F)."""
        if not self.gated:
            return self._pointwise.function(h_NG)
        return self.gate(*h_NG.chunk(2, dim=-1))

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return `f(gate) * up`."""
        return self._pointwise.function(gate) * self._raised(up)

    def _raised(self, up: Tensor) -> Tensor:
        return up if self._up is None else self._up.function(up)

    def forward_into(self, h_NG: Tensor, a_NF: Tensor) -> None:
        """Write the hidden activations of `h_NG` to `a_NF`. Not differentiable."""
        if not self.gated:
            self._pointwise.forward_into(h_NG, a_NF)
            return
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        self._pointwise.forward_into(gate_NF, a_NF)
        a_NF.mul_(self._raised(up_NF))

    def backward_into(
        self, h_NG: Tensor, da_NF: Tensor, a_NF: Tensor, dh_NG: Tensor | None, dots_N: Tensor | None
    ) -> None:
        """Run the backward pass of the activation, recomputing its output.

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
                self._pointwise.backward_into(da_NF, h_NG, dh_NG)
            return
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        dgate_NF, dup_NF = dh_NG.chunk(2, dim=1)
        raised_NF = self._raised(up_NF)
        self._pointwise.forward_into(gate_NF, dup_NF)
        torch.mul(dup_NF, raised_NF, out=a_NF)
        _dot_rows(a_NF, da_NF, dots_N, scratch_NF=dgate_NF)
        dup_NF.mul_(da_NF)
        if self._up is not None:
            self._up.backward_into(dup_NF.clone(), up_NF, dup_NF)
        self._pointwise.backward_into(da_NF.mul_(raised_NF), gate_NF, dgate_NF)


def _dot_rows(a_NF: Tensor, b_NF: Tensor, out_N: Tensor | None, scratch_NF: Tensor | None) -> None:
    if out_N is not None:
        torch.sum(torch.mul(a_NF, b_NF, out=scratch_NF), 1, dtype=out_N.dtype, out=out_N)
