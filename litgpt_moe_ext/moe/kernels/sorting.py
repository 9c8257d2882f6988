"""The order of routed rows, without asking the device for numbers.

Shape legend: T tokens, K chosen experts per token, E experts, R = T * K routed rows in the order of experts.
"""

import torch
from torch import Tensor


def sort_rows(experts_TK: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the T * K choices by expert, keeping the order of tokens.

    Args:
        experts_TK: Chosen experts, int64.
        counts_E: Tokens per expert.

    Returns:
        For each row in the order of experts, which of the choices it is, int64 (R,); and where the rows of each expert
        end, int32 (E,).
    """
    # A radix sort makes a pass over all keys for every byte of a key.
    n_expert = counts_E.size(0)
    key_dtype = torch.uint8 if n_expert <= 2**8 else torch.int16 if n_expert <= 2**15 else torch.int32
    rows_R = experts_TK.flatten().to(key_dtype).sort(stable=True).indices
    return rows_R, counts_E.cumsum(0, dtype=torch.int32)
