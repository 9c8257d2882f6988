"""Muon for matrices and stacks of matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the update of a matrix by the nearest
semi-orthogonal one. `torch.optim.Muon` refuses everything that is not two-dimensional. Here the experts of an MoE
layer, stacked along the first dimension, are orthogonalised one by one in batched products, and so are gate and up
projections that are concatenated in one tensor.

Shape legend: N matrices, A rows, B columns of one matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from litgpt_moe_ext.training.optim.orthogonal import MatrixUpdate, alike_together, orthogonalized
from litgpt_moe_ext.training.optim.parameter_groups import MATRIX_PARTS
from litgpt_moe_ext.training.optim.shards import local_part, sharded_like


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups that have `matrix_parts`, AdamW for the others.

    The update of a matrix is scaled by `0.2 sqrt(max(A, B))`, which gives it the size of AdamW's (arXiv:2502.16982,
    section 2.2), so that one learning rate and one weight decay serve both. `parameter_groups` makes the groups.

    Args:
        params: Parameters or groups.
        lr: Learning rate of both. That of a group may also be a float32 scalar on the device.
        weight_decay: Decoupled weight decay of both.
        momentum: Muon's Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: {lr} must be at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: {momentum} must be at least 0 and below 1")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps: {ns_steps} must be from 1 to 99")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: {betas} must be two numbers of at least 0 and below 1")
        settings = {"weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps}
        super().__init__(params, {"lr": lr, **settings, "betas": tuple(betas), "eps": eps, MATRIX_PARTS: 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices: list[MatrixUpdate] = []
        for group in self.param_groups:
            updates = [
                MatrixUpdate(parameter, gradient, group)
                for parameter in group["params"]
                if (gradient := parameter.grad) is not None
            ]
            if group[MATRIX_PARTS]:
                matrices += updates
            elif updates:
                self._adamw(group, updates)
        for alike in alike_together(matrices):
            self._muon(alike)
        return loss

    def _muon(self, updates: list[MatrixUpdate]) -> None:
        ahead: list[Tensor] = []
        for group, members in _by_group(updates):
            gradients = [local_part(update.gradient) for update in members]
            averages = [local_part(self._average(update)) for update in members]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            parts = torch._foreach_lerp(gradients, averages, group["momentum"])
            ahead += [sharded_like(update.gradient, part) for update, part in zip(members, parts, strict=True)]
        changes = map(local_part, orthogonalized(updates, ahead))
        for group, members in _by_group(updates):
            parameters = [local_part(update.parameter) for update in members]
            _descend(parameters, list(islice(changes, len(members))), group, max(members[0].sides))

    def _average(self, update: MatrixUpdate) -> Tensor:
        state = self.state[update.parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(update.gradient)
        return state["momentum_buffer"]

    def _adamw(self, group: dict[str, Any], updates: list[MatrixUpdate]) -> None:
        parameters = [update.parameter for update in updates]
        gradients = [update.gradient for update in updates]
        states = [self.state[parameter] for parameter in parameters]
        fused = all(parameter.is_cuda for parameter in parameters)
        for parameter, state in zip(parameters, states, strict=True):
            # The fused kernel needs the step count on the weights' device, but torch loads it to where it was saved.
            counts_on = parameter.device if fused else "cpu"
            if state:
                state["step"] = state["step"].to(counts_on)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32, device=counts_on)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            [local_part(parameter) for parameter in parameters],
            [local_part(gradient) for gradient in gradients],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=fused or None,  # None: torch chooses
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _descend(parameters: list[Tensor], changes: list[Tensor], group: dict[str, Any], side: int) -> None:
    """Decay parameters and move them against `changes`, which are overwritten.

    Args:
        parameters: Parameters of one group.
        changes: Orthogonalised changes, in their shapes.
        group: The group, whose rate is a number or a tensor, which torch does not take as a factor of what it adds.
        side: The longer side of a matrix.
    """
    rate, decay = group["lr"], group["weight_decay"]
    if isinstance(rate, Tensor):
        torch._foreach_mul_(parameters, torch.rsub(rate, 1, alpha=decay))
        torch._foreach_mul_(changes, rate * (-0.2 * side**0.5))
        torch._foreach_add_(parameters, changes)
    else:
        torch._foreach_mul_(parameters, 1 - rate * decay)
        torch._foreach_add_(parameters, changes, alpha=-(rate * 0.2 * side**0.5))


def _by_group(updates: list[MatrixUpdate]) -> Iterator[tuple[dict[str, Any], list[MatrixUpdate]]]:
    """Yield each run of consecutive updates of one group, with the group."""
    for _, members in groupby(updates, key=lambda update: id(update.group)):
        listed = list(members)
        yield listed[0].group, listed
