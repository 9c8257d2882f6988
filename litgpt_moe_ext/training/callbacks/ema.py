"""An exponential moving average of the weights (Polyak averaging), as a checkpoint inside each checkpoint.

`<checkpoint>/ema` is a LitGPT checkpoint directory of its own: `litgpt generate <checkpoint>/ema` uses the averaged
model. The routers' balancing biases are averaged like weights, since the choice of experts depends on both.
"""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.checkpoint.progress import AVERAGE
from litgpt_moe_ext.training.optim.shards import is_shard, shard_like
from litgpt_moe_ext.training.settings import EmaArgs


class WeightAverage(Callback):
    """Keep the average up to date after every optimizer step, in float32, on the device of the weights.

    Args:
        args: The decay, which must not be None.
    """

    def __init__(self, args: EmaArgs) -> None:
        self._update = get_ema_multi_avg_fn(args.decay)
        self._average: dict[str, Tensor] = {}
        self._columns: list[tuple[list[Tensor], list[Tensor]]] = []

    def on_after_setup(self, fabric: L.Fabric, module: nn.Module) -> None:
        """Keep the model."""
        self._fabric, self._model = fabric, module

    def on_fit_begin(self, resume_dir: Path | None) -> None:
        """Start from the average in the checkpoint, or else from the present weights."""
        # Views that share the weights' memory: optimizers and balancing update it in place.
        weights = {name: t.detach() for name, t in self._model.state_dict().items() if t.is_floating_point()}
        self._average = {name: weight.clone().float() for name, weight in weights.items()}
        # One fused call cannot mix sharded and whole tensors.
        for sharded in (False, True):
            names = [name for name, weight in weights.items() if is_shard(weight) == sharded]
            if names:
                self._columns.append(([self._average[name] for name in names], [weights[name] for name in names]))
        if resume_dir is None:
            return
        file = resume_dir / AVERAGE / WEIGHTS_FILE
        if not file.is_file():
            self._fabric.print(f"{resume_dir} has no averaged weights: the average starts from its weights.")
            return
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["model"]
        for name, average in self._average.items():
            average.copy_(shard_like(saved[name], average))

    @torch.no_grad()
    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """Move the average towards the new weights."""
        for averages, weights in self._columns:
            self._update(averages, [weight.float() for weight in weights], None)

    def on_checkpoint_staged(self, directory: Path) -> None:
        """Write the average into an unfinished checkpoint; every process must call this."""
        # Gather tensors one by one to the first rank's CPU: together they may not fit on a GPU.
        whole = {name: self._gathered(average) for name, average in self._average.items()}
        if not self._fabric.is_global_zero:
            return
        target = directory / AVERAGE
        target.mkdir()
        torch.save({"model": whole}, target / WEIGHTS_FILE)
        for file in directory.iterdir():
            if file.is_file() and file.name != WEIGHTS_FILE:
                shutil.copy(file, target)

    def _gathered(self, average: Tensor) -> Tensor | None:
        tensor = average.full_tensor() if is_shard(average) else average
        return tensor.cpu() if self._fabric.is_global_zero else None
