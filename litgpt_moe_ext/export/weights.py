"""The weights of a new LitGPT checkpoint."""

from collections.abc import Iterable
from pathlib import Path

from litgpt.utils import incremental_save
from torch import Tensor

from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE


def save_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write weights one at a time, so that memory holds one of them and not the model.

    Args:
        weights: Names and tensors on the CPU, which may be views of others.
        folder: The directory of the checkpoint.
    """
    with incremental_save(folder / WEIGHTS_FILE) as saver:
        saver.save({name: saver.store_early(_owned(tensor)) for name, tensor in weights})


def _owned(tensor: Tensor) -> Tensor:
    # Saving writes the whole storage, which a view shares with its base.
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
