"""Whether a model fits into the available memory for training, and the message when memory runs out.

The model card (`litgpt-moe model-card`) shows the need in each phase. This is the minimum that no batch size or length
can lower: weights, gradients and the optimizer's two averages.
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
    from litgpt_moe_ext.training.phases.launch import Launched

_GIB = 1024**3
_COPIES = {"weights": 1, "weights, gradients": 2, "weights, gradients and two averages of AdamW": 4}
_REMEDY = (
    "`litgpt-moe model-card RECIPE` says what takes how much. Lower train.micro_batch_size, or set "
    "activation_checkpointing: full or fused_cross_entropy: true; shard the model with strategy: fsdp2 over more "
    "devices; or make it smaller"
)


def check_memory(launched: Launched) -> None:
    """Refuse a model whose weights and gradients alone exceed the memory of a device.

    Raises:
        SettingsError: With the memory needed, the memory available, and what to change.
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
def explaining_lack_of_memory(launched: Launched) -> Iterator[None]:
    """Explain the need of memory if it runs out in the scope.

    Raises:
        TrainingStopped: Instead of torch's error, if this is the only process. With several, torch's error stays, as it
            is what ends the others.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator has no error class of its own.
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
    """Return the memory of a device in bytes per process on it, or None if unknown."""
    device = launched.fabric.device
    if device.type == "cuda":
        options = launched.plan.settings.distributed
        offloaded = options.cpu_offload or options.offload_optimizer or options.offload_parameters
        return None if offloaded else torch.cuda.get_device_properties(device).total_memory
    memory = memory_bytes()
    return None if memory is None else memory // launched.devices
