"""What CUDA graphs do, on a CPU: passes that run again on the same tensors, and add gradients where they did."""

import contextlib

import torch
from torch import Tensor

from litgpt_moe_ext.moe.kernels import step_weights
from litgpt_moe_ext.training.steps.capture import Loss, Passes, leaves_of


class Reruns:
    """Makes passes that run the loss function again."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        self.captured += 1
        # What was shared when a graph was captured is so when it is replayed.
        shared = contextlib.nullcontext if (weights := step_weights._sharing) is None else weights.shared
        with torch.random.fork_rng():
            value = loss(ids_BT, targets_BT)
        static, scale, latest = value.detach().clone(), torch.ones_like(value), []
        kept = {leaf: leaf.grad for leaf in leaves_of(value)}
        for leaf in kept:
            leaf.grad = None
        value.backward(scale)
        for leaf, grad in kept.items():
            leaf.grad = grad
        if not add:
            kept = dict.fromkeys(kept)
        gradients = {leaf: torch.full_like(leaf, torch.nan) if grad is None else grad for leaf, grad in kept.items()}

        def forward() -> None:
            with shared():
                latest[:] = [loss(ids_BT, targets_BT)]
            static.copy_(latest[0].detach())

        def backward() -> None:
            with shared():
                found = torch.autograd.grad(latest.pop(), list(gradients), scale, allow_unused=True)
            for (leaf, total), new in zip(gradients.items(), found, strict=True):
                if kept[leaf] is None:
                    total.copy_(new)
                elif new is not None:  # otherwise a product has added it
                    total.add_(new)

        return Passes(forward, backward, static, scale, gradients)
