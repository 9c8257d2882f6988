"""What the Triton kernels share: their arguments, and how a block finds its expert.

Groups of arguments are named tuples: a kernel sees `x.data` and `x.stride` as it would see arguments of these names.
A group of constants is handed on whole: Triton before 3.7 takes no strings out of one as an argument.

Shape legend: T tokens, K chosen experts per token, E experts, R = T * K routed rows in the order of experts.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import power_of_two
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import Precision, precision_of

if TYPE_CHECKING:
    # To a type checker a constant of a kernel is whatever it was called with.
    constexpr = Any
else:
    from triton.language import constexpr


class Rows(NamedTuple):
    """A matrix whose rows are contiguous.

    Attributes:
        data: Its memory.
        stride: Elements from one row to the next.
    """

    data: Any
    stride: Any

    @property
    def reach(self) -> int:
        """Within how many elements all rows lie; kernels count up to 2^31 in 32 bits."""
        return self.data.size(0) * self.stride


class Stack(NamedTuple):
    """A stack of matrices, one for each expert.

    Attributes:
        data: Its memory.
        stride_e: Elements from one expert to the next.
        stride_o: Elements from one output to the next.
        stride_i: Elements from one input to the next.
        n_out: Number of outputs.
        n_in: Number of inputs.
    """

    data: Any
    stride_e: Any
    stride_o: Any
    stride_i: Any
    n_out: Any
    n_in: Any

    @property
    def reach(self) -> int:
        """Within how many elements the matrix of one expert lies."""
        return (self.n_out - 1) * self.stride_o + (self.n_in - 1) * self.stride_i + 1


def rows_of(x: Tensor) -> Rows:
    """Return the matrix as a kernel takes it, copied if its rows are not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Rows(x, x.stride(0))


def stack_of(weight_EOI: Tensor) -> Stack:
    """Return a stack of weights, or a view of one, as a kernel takes it."""
    stride_e, stride_o, stride_i = weight_EOI.stride()
    return Stack(weight_EOI, stride_e, stride_o, stride_i, weight_EOI.size(1), weight_EOI.size(2))


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a card, or None for the CPU, where the interpreter works."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def precision_for(device: torch.device, dtype: torch.dtype) -> tuple[Precision, str]:
    """Return how `dtype` is multiplied on `device`, for its blocks and for `dot`."""
    capability = capability_of(device)
    precision = precision_of(dtype, capability)
    how = "widened" if capability is None and dtype == torch.bfloat16 else "tf32" if precision == "tf32" else "ieee"
    return precision, how


def block_of(width: int) -> tuple[int, int]:
    """Return the rows and columns of a block for what is computed element by element in rows of `width`."""
    columns = min(power_of_two(max(width, 16)), 512)
    return 1024 // columns, columns


@triton.jit
def dot(a, b, total, FORM: constexpr):
    """Return `total + a @ b`, summed in float32.

    Args:
        a: Left operand.
        b: Right operand.
        total: What is added, float32.
        FORM: Has the `precision`: `ieee` or `tf32` for float32; `widened` for bfloat16 in the interpreter, which has no
            such product.
    """
    if FORM.precision == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=FORM.precision)


@triton.jit
def token_of(choice_M, TOP_K: constexpr):
    """Return the tokens that choices are of, int32, in which rows are counted.

    To divide 64 bits by what is no constant would be a third of the instructions in the loop of a product.
    """
    return choice_M.to(tl.int32) // TOP_K


@triton.jit
def find_tile(plan, tile, ROWS: constexpr, EXPERTS: constexpr):
    """Return the expert of block `tile`, its first row, and where the expert's rows end.

    The blocks of all experts are numbered one expert after the other. Each program counts them anew from where the
    experts end: a few hundred integers, where a table would be another kernel and asking the device would be a wait.

    Args:
        plan: Which rows belong to which expert.
        tile: Number of the block.
        ROWS: Rows of a block.
        EXPERTS: The power of two that is not less than the number of experts.

    Returns:
        The expert (at least `plan.n_expert` if there are fewer blocks), its block's first row, and its end.
    """
    expert_E = tl.arange(0, EXPERTS)
    real_E = expert_E < plan.n_expert
    end_E = tl.load(plan.ends + expert_E, mask=real_E, other=0)
    start_E = tl.load(plan.ends + expert_E - 1, mask=real_E & (expert_E > 0), other=0)
    n_tile_E = (end_E - start_E + ROWS - 1) // ROWS
    last_E = tl.cumsum(n_tile_E, 0)
    expert = tl.sum((last_E <= tile).to(tl.int32), 0)
    mine_E = expert_E == expert
    first = tl.sum(tl.where(mine_E, start_E + (tile - last_E + n_tile_E) * ROWS, 0), 0)
    end = tl.sum(tl.where(mine_E, end_E, 0), 0)
    return expert, first, end
