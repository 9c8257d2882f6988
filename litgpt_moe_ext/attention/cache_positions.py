"""The range of positions in a call with a cache, without waiting for a device.

Shape legend: B batch, T tokens.
"""

import torch
from torch import Tensor


def position_range(input_pos: Tensor, input_pos_maxp1: int | None) -> tuple[int | None, int | None]:
    """Bound the positions of a call with a cache.

    On a CPU the positions are read. On other devices, under `torch.compile` and for fake tensors, which have no
    content, only `input_pos_maxp1` is known: LitGPT's `max(input_pos) + 1`.

    Args:
        input_pos: Positions, (T,) without gaps, or (B, T).
        input_pos_maxp1: The largest of them plus 1, if the caller knows it.

    Returns:
        The smallest position, and the largest plus 1; None for each that is not known.
    """
    if input_pos.numel() == 0:
        return None, input_pos_maxp1
    # A fake tensor is of a subclass.
    if input_pos.device.type == "cpu" and type(input_pos) is Tensor and not torch.compiler.is_compiling():
        if input_pos.numel() == 1:
            position = int(input_pos)
            return position, position + 1
        smallest, largest = input_pos.aminmax()
        return int(smallest), int(largest) + 1
    if input_pos_maxp1 is None or input_pos.dim() > 1:
        return None, input_pos_maxp1
    return input_pos_maxp1 - input_pos.size(0), input_pos_maxp1
