"""Metrics added to LitGPT's: gradient norm, load of the experts, and token counts at validations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from litgpt_moe_ext.moe.balancing.metrics import load_metrics
from litgpt_moe_ext.training.callback import Callback

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric


class StepMetrics(Callback):
    """Log, in training lines, `grad_norm` before clipping and how evenly the last optimizer step used the experts.

    In validation lines, log `total_tokens`, which LitGPT logs only in training lines.

    Args:
        fabric: The running Fabric, which knows the iteration.
        tokens_per_iteration: Tokens of a micro-batch, over all processes.
    """

    def __init__(self, fabric: TrainingFabric, tokens_per_iteration: int) -> None:
        self._fabric, self._tokens_per_iteration = fabric, tokens_per_iteration
        self._norm: Tensor | None = None

    def on_gradients_clipped(self, norm: Tensor | None, module: Any, optimizer: Any, scaled: bool) -> None:
        """Keep the norm on its device."""
        self._norm = norm

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the metrics."""
        if "loss" in metrics:
            if self._norm is not None:
                metrics["grad_norm"] = self._norm.item()
            metrics.update(load_metrics(self._fabric.state["model"]))
        if "val_loss" in metrics:
            metrics["total_tokens"] = self._fabric.state["iter_num"] * self._tokens_per_iteration
