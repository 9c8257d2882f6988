"""The nearest semi-orthogonal matrices of Muon's updates, in few launches.

Matrices with the same two side lengths share their products, whether wide or tall, stacked like experts or concatenated
like gate and up projections, and whatever their group.

Shape legend: N matrices, A rows, B columns of one matrix.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.training.optim.parameter_groups import MATRIX_PARTS
from litgpt_moe_ext.training.optim.shards import is_shard, local_part, sharded_like

# Quintic Newton-Schulz coefficients of the reference, chosen for the steepest slope at zero.
_A, _B, _C = 3.4445, -4.7750, 2.0315
# Elements of parameters to update together: enough to merge many launches, while the copies stay small (128 MiB).
_TOGETHER = 1 << 25


def orthogonalize(x_NAB: Tensor, steps: int = 5) -> Tensor:
    """Return approximately `U V^T` of the singular value decomposition of each matrix.

    Singular values end between about 0.7 and 1.2, which serves training as well as exactly 1. Products are computed in
    bfloat16, but in float32 on CPUs: few CPUs multiply bfloat16 in hardware, and on others it takes several times as
    long.

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


class MatrixUpdate(NamedTuple):
    """A parameter to update.

    Attributes:
        parameter: The parameter.
        gradient: Its gradient.
        group: Its parameter group.
    """

    parameter: Tensor
    gradient: Tensor
    group: dict[str, Any]

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of its matrices."""
        return self.parameter.size(-2) // self.group[MATRIX_PARTS], self.parameter.size(-1)

    @property
    def is_tall(self) -> bool:
        """Whether its matrices have more rows than columns."""
        rows, columns = self.sides
        return rows > columns


def alike_together(updates: list[MatrixUpdate]) -> Iterator[list[MatrixUpdate]]:
    """Yield lists of updates whose matrices have the same two side lengths, wide ones before tall ones."""
    kinds = defaultdict(list)
    for update in updates:
        parameter, gradient = update.parameter, update.gradient
        # Shards are redistributed one parameter at a time.
        alone = id(parameter) if is_shard(gradient) else 0
        sides, steps = (min(update.sides), max(update.sides)), update.group["ns_steps"]
        kinds[sides, steps, parameter.dtype, gradient.dtype, parameter.device, alone].append(update)
    for alike in kinds.values():
        alike.sort(key=lambda update: update.is_tall)
        some, elements = [], 0
        for update in alike:
            elements += update.parameter.numel()
            if some and elements > _most_together(update.parameter.device):
                yield some
                some, elements = [], update.parameter.numel()
            some.append(update)
        yield some


def _most_together(device: torch.device) -> int:
    """Return the maximum number of elements to update together."""
    # On a CPU there are no launches to save, only copies to avoid.
    return 0 if device.type == "cpu" else _TOGETHER


def orthogonalized(updates: list[MatrixUpdate], ahead: list[Tensor]) -> list[Tensor]:
    """Return `ahead`, orthogonalised matrix by matrix, in the parameters' shapes, dtype and device.

    Args:
        updates: A list that `alike_together` yields.
        ahead: One tensor for each update.
    """
    first = updates[0]

    def change(x_NAB: Tensor) -> Tensor:
        return orthogonalize(x_NAB, first.group["ns_steps"]).to(first.parameter.dtype)

    if len(updates) == 1:
        # Shards offloaded to the CPU are exchanged and computed on the GPU, like gradients.
        return [_alone(ahead[0], first.sides[0], change).to(first.parameter.device)]
    matrices = [x.reshape(-1, *update.sides) for update, x in zip(updates, ahead, strict=True)]
    changes = change(torch.cat([x.mT if update.is_tall else x for update, x in zip(updates, matrices, strict=True)]))
    sizes = [len(x) for x in matrices]
    wide = sum(not update.is_tall for update in updates)
    at = sum(sizes[:wide])
    # Transpose the tall ones back together, or each would be added by a launch of its own.
    parts = [*changes[:at].split(sizes[:wide]), *changes[at:].mT.contiguous().split(sizes[wide:])]
    return [part.reshape(x.shape) for part, x in zip(parts, ahead, strict=True)]


def _alone(update: Tensor, rows: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to the matrices of one tensor, which may be a shard.

    Args:
        update: Concatenated or stacked matrices, on the device of the mesh if they are shards.
        rows: Rows of a matrix.
        function: Takes and returns matrices, (N, A, B).
    """
    if not is_shard(update):
        return _of_matrices(update, rows, function)
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = update.device_mesh, update.placements
    if update.dim() == 3 and all(placement.is_replicate() or placement.is_shard(0) for placement in placements):
        # Stacked experts that are sharded by expert: every rank has whole matrices.
        return sharded_like(update, _of_matrices(local_part(update), rows, function))
    # Matrices cannot be orthogonalised in pieces: every rank computes the whole and keeps its part.
    whole = update.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
    return distribute_tensor(_of_matrices(whole, rows, function), mesh, placements, src_data_rank=None)


def _of_matrices(update: Tensor, rows: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    if not update.numel():  # a rank without an expert
        return update
    return function(update.reshape(-1, rows, update.size(-1))).reshape(update.shape)
