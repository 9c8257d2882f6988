"""Optimizer steps on a GPU that take the largest weights of a group first.

One launch of a fused optimizer takes 36 tensors and lasts as long as its largest block, of up to 65,536 elements: a
launch of only norms and biases is short. Outside of a step the weights stay in the model's order, on which checkpoints
and gradient clipping depend.
"""

import contextlib
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch


def step_largest_first(optimizer: torch.optim.Optimizer) -> None:
    """Sort the weights of each group by size while an optimizer steps.

    Args:
        optimizer: The optimizer, whose method `step` is replaced.
    """
    step = optimizer.step
    ordered = [sorted(group["params"], key=torch.numel, reverse=True) for group in optimizer.param_groups]

    @contextlib.contextmanager
    def sorted_groups() -> Iterator[None]:
        own = [group["params"] for group in optimizer.param_groups]
        _give(optimizer, ordered)
        try:
            yield
        finally:
            _give(optimizer, own)

    @wraps(step)
    def sorted_step(*args: Any, **kwargs: Any) -> Any:
        with sorted_groups():
            return step(*args, **kwargs)

    optimizer.step = sorted_step  # pyrefly: ignore[bad-assignment] torch's schedulers do the same


def _give(optimizer: torch.optim.Optimizer, members: list[list[torch.Tensor]]) -> None:
    for group, parameters in zip(optimizer.param_groups, members, strict=True):
        group["params"] = parameters
