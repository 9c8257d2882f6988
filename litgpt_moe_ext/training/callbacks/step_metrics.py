"""Metrics added to LitGPT's: gradient norm, load of the experts, and token counts at validations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing.metrics import load_metrics
from litgpt_moe_ext.training.callback import Callback

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric


class GradientNorm(Callback):
    """Log `grad_norm`, the gradient norm of the last optimizer step before clipping."""

    def __init__(self) -> None:
        self._norm: Tensor | None = None

    def on_gradients_clipped(self, norm: Tensor | None, module: Any, optimizer: Any, scaled: bool) -> None:
        """Keep the norm on its device."""
        self._norm = norm

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the norm to a line of training."""
        if self._norm is not None and "loss" in metrics:
            metrics["grad_norm"] = self._norm.item()


class ExpertLoad(Callback):
    """Log how evenly the last optimizer step used the experts."""

    def __init__(self) -> None:
        self._model: torch.nn.Module | None = None

    def on_after_setup(self, fabric: Any, module: torch.nn.Module) -> None:
        """Keep the model."""
        self._model = module

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of `litgpt_moe_ext.moe.balancing.metrics` to a line of training."""
        if self._model is not None and "loss" in metrics:
            metrics.update(load_metrics(self._model))


class TokensValidatedAfter(Callback):
    """Log `total_tokens` in validation lines too, as LitGPT does only in training lines.

    Args:
        fabric: The running Fabric, which knows the iteration.
        per_iteration: Tokens of a micro-batch, over all processes.
    """

    def __init__(self, fabric: TrainingFabric, per_iteration: int) -> None:
        self._fabric, self._per_iteration = fabric, per_iteration

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the tokens to a line of validation."""
        if "val_loss" in metrics:
            metrics["total_tokens"] = self._fabric.state["iter_num"] * self._per_iteration
