"""Muon for matrices and stacks of matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the update of a matrix by the nearest
semi-orthogonal one. `torch.optim.Muon` refuses everything that is not two-dimensional; here the experts of an MoE
layer, stacked along the first dimension, are orthogonalised one by one in batched products, and so are the gate and up
projections that lie above one another in one tensor.

Shape legend: N matrices, A rows, B columns of one matrix.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from litgpt_moe_ext.training.optim.parameter_groups import MATRIX_PARTS
from litgpt_moe_ext.training.optim.shards import is_shard

# Quintic Newton-Schulz coefficients of the reference, chosen for the steepest slope at zero.
_A, _B, _C = 3.4445, -4.7750, 2.0315
# Elements of parameters that are updated together: many launches become one, and the copies stay small (128 MB).
_TOGETHER = 1 << 25


def orthogonalize(x_NAB: Tensor, steps: int = 5) -> Tensor:
    """Return approximately `U V^T` of the singular value decomposition of each matrix.

    Singular values end between about 0.7 and 1.2, which serves training as well as exactly 1. The products are in
    bfloat16, on CPUs in float32: few of them multiply bfloat16 in hardware, and the others take several times as long.

    Args:
        x_NAB: Any floating dtype.
        steps: Newton-Schulz iterations.
    """
    wide = x_NAB.size(-2) <= x_NAB.size(-1)
    x = (x_NAB if wide else x_NAB.mT).to(torch.float32 if x_NAB.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x if wide else x.mT


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups that have `matrix_parts`, AdamW for the others.

    The update of a matrix is scaled by `0.2 sqrt(max(A, B))`, which gives it the size of AdamW's (arXiv:2502.16982,
    section 2.2), so that one learning rate and one weight decay serve both. `parameter_groups` makes the groups.

    Args:
        params: Parameters or groups.
        lr: Learning rate of both.
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
        for group in self.param_groups:
            updates = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            if updates:
                (self._muon if group[MATRIX_PARTS] else self._adamw)(group, updates)
        return loss

    def _muon(self, group: dict[str, Any], updates: list[tuple[Tensor, Tensor]]) -> None:
        for parameters, gradients in _alike(updates):
            states = [self.state[parameter] for parameter in parameters]
            for state, gradient in zip(states, gradients, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
            averages = [state["momentum_buffer"] for state in states]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
            first = parameters[0]
            rows = first.size(-2) // group[MATRIX_PARTS]
            step_size = group["lr"] * 0.2 * max(rows, first.size(-1)) ** 0.5

            def change(x_NAB: Tensor, steps: int = group["ns_steps"], dtype: torch.dtype = first.dtype) -> Tensor:
                return orthogonalize(x_NAB, steps).to(dtype)

            changes = _each_matrix(list(ahead), rows, change)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, changes, alpha=-step_size)

    def _adamw(self, group: dict[str, Any], updates: list[tuple[Tensor, Tensor]]) -> None:
        parameters, gradients = (list(tensors) for tensors in zip(*updates, strict=True))
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _alike(updates: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield parameters and their gradients in groups of one shape, which share their products."""
    groups = defaultdict(list)
    for parameter, gradient in updates:
        # The redistribution of a shard concerns one parameter.
        alone = id(parameter) if is_shard(gradient) else 0
        groups[parameter.shape, parameter.dtype, gradient.dtype, parameter.device, alone].append((parameter, gradient))
    for alike in groups.values():
        number = _number_together(alike[0][0])
        for start in range(0, len(alike), number):
            parameters, gradients = zip(*alike[start : start + number], strict=True)
            yield list(parameters), list(gradients)


def _number_together(parameter: Tensor) -> int:
    # A CPU has no launches to save, and would have copies to make.
    return 1 if parameter.device.type == "cpu" else max(1, _TOGETHER // max(parameter.numel(), 1))


def _each_matrix(updates: list[Tensor], rows: int, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    update = updates[0]
    if not is_shard(update):
        return _in_batches(updates, rows, function)
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh, placements = update.device_mesh, update.placements
    if update.dim() == 3 and all(placement.is_replicate() or placement.is_shard(0) for placement in placements):
        # Stacked experts that are cut between experts: every rank has whole matrices.
        (result,) = _in_batches([update.to_local()], rows, function)
        shape, stride = update.shape, update.stride()
        return [DTensor.from_local(result, mesh, placements, run_check=False, shape=shape, stride=stride)]
    # A shard of a matrix is not a matrix: every rank works on the whole and keeps its part.
    whole = update.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
    (result,) = _in_batches([whole], rows, function)
    return [distribute_tensor(result, mesh, placements, src_data_rank=None)]


def _in_batches(updates: list[Tensor], rows: int, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    first = updates[0]
    if not first.numel():  # a rank without an expert
        return updates
    matrices = [update.reshape(-1, rows, first.size(-1)) for update in updates]
    results = function(matrices[0] if len(matrices) == 1 else torch.cat(matrices))
    return [result.reshape(first.shape) for result in results.split(len(matrices[0]))]
