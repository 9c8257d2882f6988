"""LitGPT's own loops on several GPUs, where torch's FSDP shards the model: what they load, and in which precision."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.host.replaced import wrapping


def load_training_checkpoints(utils: Any) -> None:
    """Load the weights of a training checkpoint into a sharded model, as LitGPT does into others.

    It would look for them at the top of the file. A full finetuning ends there; one of adapters, to which no key of a
    checkpoint is missing, would train on weights that nothing has set.
    """

    @wrapping(utils, "load_checkpoint")
    def load_checkpoint(
        original: Any, fabric: Any, model: Any, checkpoint_path: Path, strict: bool = True, **more: Any
    ) -> None:
        if _is_sharded(fabric) and (weights := _weights_inside(checkpoint_path)) is not None:
            _load_whole(fabric, model, weights, strict)
        else:
            original(fabric, model, checkpoint_path, strict=strict, **more)


def load_training_checkpoints_with_adapters(utils: Any) -> None:
    """Do the same where a finetuning of adapters resumes."""

    @wrapping(utils, "load_checkpoint_update")
    def load_checkpoint_update(
        original: Any, fabric: Any, adapter_path: Path, model: Any, checkpoint_path: Path, strict: bool = True
    ) -> None:
        if _is_sharded(fabric) and (weights := _weights_inside(checkpoint_path)) is not None:
            _load_whole(fabric, model, weights | _load(adapter_path), strict)
        else:
            original(fabric, adapter_path, model, checkpoint_path, strict)


def keep_biases_exact(loop: Any) -> None:
    """Keep buffers in float32 where FSDP computes in 16 bits, in which a balancing bias stops moving."""

    @wrapping(loop, "main")
    def main(original: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        fabric = given["fabric"]
        if uses_plugin(given["config"]) and _is_sharded(fabric):
            precision = fabric.strategy.mixed_precision_config
            fabric.strategy.mixed_precision = dataclasses.replace(precision, buffer_dtype=None)
        return original(*args, **kwargs)


def _is_sharded(fabric: Any) -> bool:
    from lightning.fabric.strategies import FSDPStrategy

    return isinstance(getattr(fabric, "strategy", None), FSDPStrategy)


def _load(path: Path) -> dict[str, Any]:
    import torch

    return torch.load(path, mmap=True, map_location="cpu", weights_only=True)


def _weights_inside(checkpoint_path: Path) -> dict[str, Any] | None:
    return _load(checkpoint_path).get("model")


def _load_whole(fabric: Any, model: Any, weights: dict[str, Any], strict: bool) -> None:
    # What `fabric.load_raw` does with the content of a file. `fabric.load` would read the optimizer's state too.
    from lightning.fabric.strategies.model_parallel import _load_raw_module_state
    from lightning.fabric.wrappers import _unwrap_objects

    _load_raw_module_state(weights, _unwrap_objects(model), fabric.world_size, strict)
