"""Whole tensors from every rank's shards, and back.

DeepSpeed keeps a rank's float32 weights and optimizer states as flat vectors of shards of several weights. How a weight
is sharded depends on the stage; both classes have the same methods. With a `key`, these work on an optimizer state of
the weight's shape.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatShards:
    """Stages 1 and 2: the weights of a group in one vector; every rank has a contiguous part.

    Args:
        zero: DeepSpeed's optimizer.
        members: The weights of every group of the torch optimizer, before DeepSpeed replaced them.
    """

    def __init__(self, zero: Any, members: Iterable[list[nn.Parameter]]) -> None:
        self._zero = zero
        self._group = {id(parameter): i for i, group in enumerate(members) for parameter in group}

    def flats(self) -> list[Tensor]:
        """Return the flat vectors of float32 weights of this rank, which are what the torch optimizer steps."""
        return [group["params"][0] for group in self._zero.optimizer.param_groups]

    def gather(self, parameter: Any, key: str | None = None) -> Tensor:
        """Return a whole float32 weight or state of it; every rank must call."""
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for ours, theirs in self._overlap(parameter, whole, key):
            theirs.copy_(ours)
        dist.all_reduce(whole)
        return whole

    def scatter(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Keep this rank's shard of a whole tensor."""
        for ours, theirs in self._overlap(parameter, value, key):
            ours.copy_(theirs)

    def refresh(self, parameter: Any, value: Tensor) -> None:
        """Have the working copy of a weight follow a `scatter`."""
        parameter.data.copy_(value)

    def _overlap(self, parameter: Any, whole: Tensor, key: str | None) -> Iterable[tuple[Tensor, Tensor]]:
        # The part of this rank's shard that belongs to the weight, beside the same part of the whole weight.
        mapping = parameter._hp_mapping
        if mapping is None:
            return
        flat = self.flats()[self._group[id(parameter)]]
        source = flat.detach() if key is None else self._zero.optimizer.state[flat][key]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield source.narrow(0, here.start, here.numel), whole.reshape(-1).narrow(0, there.start, there.numel)


class SplitShards:
    """Stage 3: every weight by itself cut into equal shards, one for each rank, the last ones padded.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def flats(self) -> list[Tensor]:
        """Return the flat vectors of float32 weights of this rank, which are what the torch optimizer steps."""
        return self._zero.fp32_partitioned_groups_flat

    def gather(self, parameter: Any, key: str | None = None) -> Tensor:
        """Return a whole float32 weight or state of it; every rank must call."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        if whole is None:
            raise ValueError(f"DeepSpeed has no {key or 'weight'} of a parameter of shape {tuple(parameter.ds_shape)}")
        return whole

    def scatter(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Keep this rank's shard of a whole tensor."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        start = min(size * dist.get_rank(), value.numel())
        piece = torch.zeros(size, dtype=torch.float32)
        part = value.reshape(-1)[start : start + size]
        piece[: part.numel()] = part
        if key is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, key)

    def refresh(self, parameter: Any, value: Tensor) -> None:
        """Have the working copy of a weight follow a `scatter`."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)
