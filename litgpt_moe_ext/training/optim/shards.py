"""Tensors that are shards of larger ones, without loading what makes them.

`torch.distributed.tensor` takes a second to import; where it is not loaded, no tensor is sharded.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Any) -> "TypeGuard[DTensor]":
    """Return whether `tensor` is a `torch.distributed.tensor.DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor, in its memory, or all of it where it is no shard; call without autograd.

    What works number by number is computed with that, in the kernels of ordinary tensors. Torch plans an operation on
    shards anew in every step where it takes lists of them, and has rules for more such operations in later versions.
    """
    return tensor.to_local() if is_shard(tensor) else tensor


def sharded_like(tensor: Tensor, part: Tensor) -> Tensor:
    """Return the tensor of the shape of `tensor` of which this rank has `part`, on the device of the mesh.

    Args:
        tensor: A shard, or not, of which `part` could be this rank's part.
        part: Wherever it is.
    """
    if not is_shard(tensor):
        return part
    from torch.distributed.tensor import DTensor

    mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
    part = part.to(mesh.device_type)
    return DTensor.from_local(part, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor, which every rank has, sharded as `tensor` is; without communication."""
    if not is_shard(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
