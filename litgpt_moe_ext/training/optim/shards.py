"""Helpers for sharded tensors, without importing `torch.distributed.tensor`.

That import takes a second; as long as it is not loaded, no tensor is sharded.
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


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory, or the tensor itself if not sharded; without autograd.

    Elementwise operations use the part, with the kernels of ordinary tensors. On lists of shards, torch would plan an
    operation anew in every step, and older versions lack rules for some operations.
    """
    return tensor.to_local() if is_shard(tensor) else tensor


def sharded_like(tensor: Tensor, part: Tensor) -> Tensor:
    """Return `part` as this rank's part of a tensor sharded like `tensor`, on the device of the mesh.

    Args:
        tensor: A sharded or whole tensor, of whose shape `part` could be this rank's part.
        part: This rank's part, on any device.
    """
    if not is_shard(tensor):
        return part
    from torch.distributed.tensor import DTensor

    mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
    part = part.to(mesh.device_type)
    return DTensor.from_local(part, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def shard_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor, present on every rank, sharded like `tensor`, without communication."""
    if not is_shard(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
