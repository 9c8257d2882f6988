"""The modules that compute grouped products: `litgpt_moe_ext.moe.kernels.triton`, or `native` with torch's product.

Triton is imported when the first operator runs; fake tensors do not need it.
"""

from typing import Any

from torch import Tensor

from litgpt_moe_ext.kernels.launch import triton_works_on
from litgpt_moe_ext.moe.kernels import native


def engine_of(call: Any) -> Any:
    """Return the module that computes the products.

    Args:
        call: Arguments of an operator, whose `engine` is `triton` or `torch`.
    """
    return native if call.engine == "torch" else _triton()


def beside(call: Any, x: Tensor) -> Any:
    """Return the module that computes everything but the products.

    Triton's kernels take one launch each, so they are used with torch's products too.

    Args:
        call: As above.
        x: On the device where they run.
    """
    return native if call.engine == "torch" and not (x.is_cuda and triton_works_on(x.device)) else _triton()


def _triton() -> Any:
    from litgpt_moe_ext.moe.kernels import triton

    return triton
