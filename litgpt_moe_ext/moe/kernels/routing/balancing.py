"""Moves the balancing biases of all layers on a GPU in one launch, where torch's operators take a dozen.

`litgpt_moe_ext.moe.balancing.bias` implements the rule with torch's operators; it is the reference, and runs everywhere
else. Nothing here is differentiated or compiled, so no torch operator is defined.

Shape legend: E experts, N numbers of a record.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.launch import operators_are_unwatched

# More do not fit into the registers of a block.
_MOST_EXPERTS = 1024


class Moved(NamedTuple):
    """Biases of layers with the same settings, and what moves them.

    Attributes:
        biases: Of each layer, (E,).
        records: The sums of the step of each layer, (N,), of which the first E are tokens per expert.
        updates: How often each bias has moved, scalars; none without a schedule.
        rate: Step size.
        schedule: How it changes (`litgpt_moe_ext.moe.balancing.bias.scheduled_rate`); None if it does not.
    """

    biases: Sequence[Tensor]
    records: Sequence[Tensor]
    updates: Sequence[Tensor]
    rate: float
    schedule: Mapping[str, int] | None


def works_on(moved: Moved) -> bool:
    """Return whether `move_biases` can be used: plain tensors on one GPU, float32 biases of up to 1024 experts."""
    record, n_expert = moved.records[0], moved.biases[0].numel()
    return (
        n_expert <= _MOST_EXPERTS
        and record.dtype == torch.float64
        and operators_are_unwatched(record)
        and all(_is_plain(bias, torch.float32, record.device) and bias.shape == (n_expert,) for bias in moved.biases)
        and all(_is_plain(update, torch.int64, record.device) for update in moved.updates)
    )


def _is_plain(x: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return type(x) is Tensor and x.dtype == dtype and x.device == device and x.is_contiguous()


def move_biases(moved: Moved) -> None:
    """Move all biases, in place, and add one to `updates`.

    The results equal those of `litgpt_moe_ext.moe.balancing.bias.updated_bias` on a CPU up to the last bit of a mean.

    Args:
        moved: For which `works_on` is true.
    """
    from litgpt_moe_ext.moe.kernels.triton import balancing

    balancing.move_biases(moved)
