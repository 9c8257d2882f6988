"""Grouped products in Triton, for every NVIDIA card since Turing; nothing here waits for the device.

It has the functions of `litgpt_moe_ext.moe.kernels.native`, and `decode` for a handful of tokens.
"""

from litgpt_moe_ext.moe.kernels.triton.activation import activate, activate_backward
from litgpt_moe_ext.moe.kernels.triton.combining import combine
from litgpt_moe_ext.moe.kernels.triton.decoding import decode
from litgpt_moe_ext.moe.kernels.triton.rows import multiply_rows
from litgpt_moe_ext.moe.kernels.triton.weights import sum_outer_products, sum_rows

__all__ = ["activate", "activate_backward", "combine", "decode", "multiply_rows", "sum_outer_products", "sum_rows"]
