"""What a kernel is called with, and what it returns.

Shape legend: B batch, T queries, S keys, H query heads, G key/value heads, d head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What to compute, apart from tensors.

    Attributes:
        kernel: Name of the kernel.
        scale: Factor of the scores.
        causal: Whether a query sees only keys up to its own position.
        window: Number of visible keys, the query's own included, or None.
        dropout: Probability of dropping an attention weight.
        longest: Upper bound of the lengths of documents; None for T.
    """

    kernel: str
    scale: float
    causal: bool
    window: int | None
    dropout: float
    longest: int | None = None


class Inputs(NamedTuple):
    """The tensors.

    Attributes:
        q_BHTd: Queries.
        k_BGSd: Keys.
        v_BGSd: Values.
        mask: Additive, broadcasts to (B, H, T, S), in the type of q, or None.
        offsets: Where the documents begin in the B * T tokens, int32, last entry B * T, or None.
    """

    q_BHTd: Tensor
    k_BGSd: Tensor
    v_BGSd: Tensor
    mask: Tensor | None = None
    offsets: Tensor | None = None


class Result(NamedTuple):
    """The result of the forward, which sinks, if any, change before the backward gets it back.

    Attributes:
        out_BHTd: The output; nothing else may refer to its memory.
        lse_BHT: Log-sum-exp of the scores, float32 (float64 for float64 inputs); nothing else may refer to its memory.
        rest: What else the backward needs, such as the random state of dropout.
    """

    out_BHTd: Tensor
    lse_BHT: Tensor
    rest: tuple[Tensor | None, ...] = ()


def check_result(kernel: str, result: object, inputs: Inputs) -> None:
    """Raise unless the forward of another package's kernel returns a `Result` that fits its inputs.

    The code that adds sinks trusts it, and would read out of bounds.
    """
    if not isinstance(result, Result):
        raise TypeError(f"attention kernel {kernel!r}: forward returns a {type(result).__name__}, not a Result")
    q_BHTd = inputs.q_BHTd
    summed = torch.float64 if q_BHTd.dtype == torch.float64 else torch.float32
    expected = {"out_BHTd": (q_BHTd.shape, q_BHTd.dtype), "lse_BHT": (q_BHTd.shape[:-1], summed)}
    for name, (shape, dtype) in expected.items():
        values = getattr(result, name)
        if not isinstance(values, Tensor):
            raise TypeError(f"attention kernel {kernel!r}: forward returns {name} {values!r}, which is no tensor")
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(
                f"attention kernel {kernel!r}: forward returns {name} of shape {tuple(values.shape)} in "
                f"{values.dtype}, not {tuple(shape)} in {dtype}"
            )


def check_gradients(kernel: str, gradients: object) -> None:
    """Raise unless the backward of another package's kernel returns three gradients."""
    if not isinstance(gradients, tuple) or [isinstance(each, Tensor) for each in gradients] != [True] * 3:
        raise TypeError(f"attention kernel {kernel!r}: backward must return a tuple of dq, dk and dv")


def window_sides(call: Call) -> tuple[int | None, int | None]:
    """Return how many keys to the left and to the right of its own position a query sees; None for all."""
    return (None, None) if call.window is None else (call.window - 1, 0)


def longest_document(inputs: Inputs, call: Call) -> int:
    """Return the upper bound of document lengths, by which kernels start their blocks."""
    return inputs.q_BHTd.size(2) if call.longest is None else call.longest


def pack(x_BHTd: Tensor, offsets: Tensor | None) -> Tensor:
    """Return (B, T, H, d), the layout of flash kernels, or (B * T, H, d) for documents."""
    x_BTHd = x_BHTd.transpose(1, 2)
    return x_BTHd if offsets is None else x_BTHd.flatten(0, 1)


def pack_lse(lse_BHT: Tensor, offsets: Tensor | None) -> Tensor:
    """Return (B, H, T), or (H, B * T) for documents."""
    return lse_BHT if offsets is None else lse_BHT.transpose(0, 1).flatten(1)


def unpack_result(out: Tensor, lse: Tensor, inputs: Inputs, rest: tuple[Tensor | None, ...] = ()) -> Result:
    """Return the packed output of a kernel as the result of a forward pass."""
    q_BHTd, offsets = inputs.q_BHTd, inputs.offsets
    if offsets is not None:
        lse = lse.unflatten(1, (q_BHTd.size(0), q_BHTd.size(2))).transpose(0, 1)
    return Result(_unpack(out, q_BHTd, offsets), lse, rest)


def unpack_gradients(dq: Tensor, dk: Tensor, dv: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed gradients of queries, keys and values in the layout of the inputs."""
    q, k, v, _, offsets = inputs
    return _unpack(dq, q, offsets), _unpack(dk, k, offsets), _unpack(dv, v, offsets)


def _unpack(packed: Tensor, like_BHTd: Tensor, offsets: Tensor | None) -> Tensor:
    x_BTHd = packed if offsets is None else packed.unflatten(0, (like_BHTd.size(0), like_BHTd.size(2)))
    return x_BTHd.transpose(1, 2)
