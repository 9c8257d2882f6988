"""Whether a model fits into the available memory for training, where it is made, and the message when memory runs out.

The model card (`litgpt-moe model-card`) shows the need in each phase. This is the minimum that no batch size or length
can lower: weights, gradients and the optimizer's two averages.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.machine import memory_bytes
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.parallel.facts import Part

if TYPE_CHECKING:
    from litgpt_moe_ext.training.phases.launch import Launched

_GIB = 1024**3
_PARTS: dict[str, tuple[Part, ...]] = {
    "weights": ("weights",),
    "weights, gradients": ("weights", "gradients"),
    "weights, gradients and two averages of AdamW": ("weights", "gradients", "optimizer"),
}
# What a whole model may take of a device: the rest is for CUDA itself, and for the shards of the first block.
_OF_WHOLE_MODEL = 0.9
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
    needed = _needed(launched, ("weights", "gradients"))
    if present is not None and needed > present:
        raise SettingsError(
            f"model_config: {_description(launched)}; a {launched.fabric.device.type} here has "
            f"{present / _GIB:,.1f} GiB for each process. Shard the model with strategy: fsdp2 over more devices, or "
            "make it smaller; `litgpt-moe model-card RECIPE` says what takes how much"
        )


def choose_place(launched: Launched) -> None:
    """Have a model that is too large for a device be made in the memory of the CPU, from where it is sharded.

    On a device its initial weights would be those of a single process. All processes make it in the same place, as each
    takes its shards from a model of its own.

    Raises:
        SettingsError: If there is no room for it either, or the strategy needs the whole model on a device.
    """
    fabric = launched.fabric
    if fabric.device.type == "cpu":
        return
    strategy, memory = fabric.strategy, memory_bytes()
    whole = _parameters(launched) * _width(strategy)
    total = _least(fabric, torch.cuda.get_device_properties(fabric.device).total_memory)
    host = _least(fabric, math.inf if memory is None else memory / launched.devices)
    place = place_of_whole(whole, total, None if strategy.made_on_cpu is None else host)
    if place == "device":
        return
    if place == "cpu":
        strategy.made_on_cpu = True
        fabric.print(
            f"A device lacks room for the whole model: it is made in the memory of the CPU ({whole / _GIB:,.1f} GiB "
            "for each process) and sharded from there. Its initial weights are not those that a device would draw."
        )
        return
    need = f"model_config: {_parameters(launched) / 1e6:,.1f} million parameters need {whole / _GIB:,.1f} GiB"
    here = f"a {fabric.device.type} here has {total / _GIB:,.1f} GiB"
    if strategy.made_on_cpu is None:
        raise SettingsError(
            f"{need} before strategy: {launched.plan.settings.strategy} could shard them, and {here}; use fsdp2 over "
            "several devices, if need be with distributed.cpu_offload, or make the model smaller"
        )
    raise SettingsError(
        f"{need} for each process before they are sharded; {here}, and the CPU "
        f"{host / _GIB:,.1f} GiB for each process; start fewer processes on each node, or "
        "make the model smaller"
    )


def place_of_whole(whole: float, device: float, host: float | None) -> Literal["device", "cpu"] | None:
    """Return where a model is made before it is sharded, or None if no place has room for it.

    Args:
        whole: Bytes of the model.
        device: Bytes of a device.
        host: Bytes of the CPU's memory for each process; None if the strategy needs the model on a device.
    """
    if whole <= _OF_WHOLE_MODEL * device:
        return "device"
    if host is not None and whole <= host:
        return "cpu"
    return "device" if whole <= device else None  # it may just fit


def _least(fabric: Any, here: float) -> float:
    """Return the least of the processes' numbers."""
    return float(fabric.all_reduce(cast(Any, float(here)), reduce_op="min"))  # Fabric makes a tensor of the number


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
    parts = (f"{name} {_needed(launched, parts) / _GIB:,.1f} GiB" for name, parts in _PARTS.items())
    return f"{_parameters(launched) / 1e6:,.1f} million parameters need at least, on each process: {'; '.join(parts)}"


def _parameters(launched: Launched) -> int:
    return count_parameters(launched.plan.config, bool(launched.plan.train.tie_embeddings)).total


def _needed(launched: Launched, parts: tuple[Part, ...]) -> float:
    """Return the bytes of parts that have the size of the model, on each process at least."""
    strategy = launched.fabric.strategy
    shares = launched.devices if strategy.facts.within_node else launched.fabric.world_size
    width: dict[Part, int] = dict.fromkeys(("weights", "gradients"), _width(strategy))
    width["optimizer"] = 2 * width["weights"]
    if strategy.facts.zero_stage is not None:
        # It works in the low precision, and optimizes a copy in float32.
        mixed = strategy.precision.precision.endswith("-mixed")
        width = {"weights": 2 if mixed else 4, "gradients": 2 if mixed else 4, "optimizer": 12}
    of_one = (width[part] / (shares if part in strategy.facts.shards else 1) for part in parts)
    return _parameters(launched) * sum(of_one)


def _width(strategy: Any) -> int:
    """Return the bytes of a weight when it is made."""
    return 2 if strategy.precision.precision in ("bf16-true", "16-true") else 4


def _present(launched: Launched) -> int | None:
    """Return the memory of a device in bytes per process on it, or None if unknown."""
    device = launched.fabric.device
    if device.type == "cuda":
        options = launched.plan.settings.distributed
        offloaded = options.cpu_offload or options.offload_optimizer or options.offload_parameters
        return None if offloaded else torch.cuda.get_device_properties(device).total_memory
    memory = memory_bytes()
    return None if memory is None else memory // launched.devices
