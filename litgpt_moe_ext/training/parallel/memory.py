"""Whether a model can be trained in the memory that there is, and what to say when it runs out.

What a model needs in each phase is the model card's to say (`litgpt-moe model-card`). Here is the least that no setting
of batch or length lowers: weights, gradients and the optimizer's two averages.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.machine import memory_bytes
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.control import TrainingStopped

if TYPE_CHECKING:
    from litgpt_moe_ext.training.launch import Launched

_GIB = 1024**3
_COPIES = {"weights": 1, "weights, gradients": 2, "weights, gradients and two averages of AdamW": 4}
_REMEDY = (
    "`litgpt-moe model-card RECIPE` says what takes how much. Lower train.micro_batch_size, or set "
    "activation_checkpointing: full or fused_cross_entropy: true; shard the model with strategy: fsdp2 over more "
    "devices; or make it smaller"
)


def check_memory(launched: Launched) -> None:
    """Refuse a model of which not even the weights and their gradients fit into the memory of a device.

    Raises:
        SettingsError: With what it needs, what there is, and what to change.
    """
    present = _present(launched)
    needed = _needed(launched, 2)
    if present is not None and needed > present:
        raise SettingsError(
            f"model_config: {_description(launched)}; a {launched.fabric.device.type} here has "
            f"{present / _GIB:,.1f} GiB for each process. Shard the model with strategy: fsdp2 over more devices, or "
            "make it smaller; `litgpt-moe model-card RECIPE` says what takes how much"
        )


@contextlib.contextmanager
def explained(launched: Launched) -> Iterator[None]:
    """Say what a model needs where the memory runs out in the scope.

    Raises:
        TrainingStopped: Instead of torch's error, if this is the only process. Where others wait, torch's error stays:
            it is what ends them.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The allocator of CPUs has no error of its own.
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        message = f"out of memory: {_description(launched)}, before any activation. {_REMEDY}"
        if launched.fabric.world_size == 1:
            raise TrainingStopped(message) from error
        print(f"error: process {launched.fabric.global_rank}: {message}", file=sys.stderr, flush=True)
        raise


def _description(launched: Launched) -> str:
    parts = (f"{name} {_needed(launched, copies) / _GIB:,.1f} GiB" for name, copies in _COPIES.items())
    return f"{_parameters(launched) / 1e6:,.1f} million parameters need at least, on each process: {'; '.join(parts)}"


def _parameters(launched: Launched) -> int:
    return count_parameters(launched.plan.config, bool(launched.plan.train.tie_embeddings)).total


def _needed(launched: Launched, copies: int) -> float:
    """Return the bytes of the model and of what has its size, on each process at least."""
    fabric = launched.fabric
    width = 2 if fabric.strategy.precision.precision in ("bf16-true", "16-true") else 4
    shares = 1 if fabric.strategy.holds_whole_model else fabric.world_size
    return _parameters(launched) * width * copies / shares


def _present(launched: Launched) -> int | None:
    """Return the memory of a device, in bytes for each process on it, or None where nothing says so."""
    device = launched.fabric.device
    if device.type == "cuda":
        knobs = launched.plan.settings.distributed
        offloaded = knobs.cpu_offload or knobs.offload_optimizer or knobs.offload_parameters
        return None if offloaded else torch.cuda.get_device_properties(device).total_memory
    memory = memory_bytes()
    return None if memory is None else memory // launched.devices
