"""Heat maps of the experts' load over the steps of a run, for loggers that show pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.fabric.loggers import TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger

from litgpt_moe_ext.pictures.expert_load import load_over_steps_figure, loads_by_layer
from litgpt_moe_ext.training.callback import Callback

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric

NAME = "moe/expert_load"


class LoadHistory:
    """Load of every expert over the run, in a bounded number of columns.

    When there are too many, neighbouring columns are merged into their mean, and each later column covers as many log
    lines as a merged one.

    Args:
        most: Maximum number of columns, even.
    """

    def __init__(self, most: int = 512) -> None:
        self._most, self._lines_per_column = most, 1
        self._columns: list[tuple[float, dict[int, np.ndarray]]] = []
        self._waiting: list[tuple[float, dict[int, np.ndarray]]] = []

    def add(self, step: int, loads: dict[int, list[float]]) -> None:
        """Add a log line: the loads of the experts over the mean, by layer."""
        self._waiting.append((step, {layer: np.array(load, dtype=np.float32) for layer, load in loads.items()}))
        if len(self._waiting) == self._lines_per_column:
            self._columns.append(_mean(self._waiting))
            self._waiting = []
        if len(self._columns) == self._most:
            self._columns = [_mean(self._columns[i : i + 2]) for i in range(0, self._most, 2)]
            self._lines_per_column *= 2

    def layers(self) -> tuple[list[float], dict[int, np.ndarray]]:
        """Return the steps of the columns, and the loads by layer, (experts, columns)."""
        columns = [*self._columns, *([_mean(self._waiting)] if self._waiting else [])]
        numbers = columns[0][1] if columns else {}
        stacked = {layer: np.stack([loads[layer] for _, loads in columns], axis=1) for layer in numbers}
        return [step for step, _ in columns], stacked


def _mean(columns: list[tuple[float, dict[int, np.ndarray]]]) -> tuple[float, dict[int, np.ndarray]]:
    step = sum(step for step, _ in columns) / len(columns)
    return step, {layer: np.mean([loads[layer] for _, loads in columns], axis=0) for layer in columns[0][1]}


def shows_pictures(logger: Any) -> bool:
    """Return whether this module can log pictures to a logger."""
    return isinstance(logger, (TensorBoardLogger, WandbLogger))


class ExpertImages(Callback):
    """Log `moe/expert_load` after every validation, a picture of this run since it was started or resumed.

    Args:
        name: Name of the run, for the title.
        fabric: The running Fabric, whose logger shows the pictures.
    """

    def __init__(self, name: str, fabric: TrainingFabric) -> None:
        self._name, self._fabric, self._history = name, fabric, LoadHistory()

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Collect a training line; draw after a validation."""
        if not self._fabric.is_global_zero:
            return
        if "loss" in metrics and (loads := loads_by_layer(metrics)):
            self._history.add(self._fabric.step, loads)
        if "val_loss" in metrics:
            steps, layers = self._history.layers()
            if layers:
                self._log(_draw(self._name, steps, layers))

    def _log(self, image_HWC: np.ndarray) -> None:
        logger: Any = self._fabric.logger
        step = self._fabric.step
        with self._fabric.surviving_the_logger():
            if isinstance(logger, WandbLogger):
                logger.log_image(NAME, [image_HWC], step=step)
            else:
                logger.experiment.add_image(NAME, image_HWC, step, dataformats="HWC")


def _draw(name: str, steps: list[float], layers: dict[int, np.ndarray]) -> np.ndarray:
    # Imported here, because few runs need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(load_over_steps_figure(name, steps, layers))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
