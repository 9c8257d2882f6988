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


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor, which every rank has, sharded as `tensor` is; without communication."""
    if not is_shard(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
