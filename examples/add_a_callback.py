"""A callback of your own: end the training as soon as the validation loss is low enough, with the weights in `best`.

A recipe names it by its class path; its arguments are settings like any other:

    callbacks:
      - class_path: examples.add_a_callback.StopWhenGood
        init_args:
          loss: 2.5

or, without a change to the recipe:

    uv run python run_train.py --callbacks+ "{class_path: examples.add_a_callback.StopWhenGood, init_args: {loss: 2.5}}"

Every event of a run is a method of `litgpt_moe_ext.training.callback.Callback`; override those that matter. A misspelt
one is an error when the class is defined. Arguments kept as attributes are written into the checkpoints'
`hyperparameters.yaml`, so that the saved settings repeat the run.
"""

from dataclasses import dataclass
from typing import Any

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.control import TrainingStopped


@dataclass
class StopWhenGood(Callback):
    """End the training when the validation loss has fallen to a value.

    Args:
        loss: Validation loss at which to stop.
    """

    loss: float

    def __post_init__(self) -> None:
        self._reached: float | None = None

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Look at every validation; a line of training has no `val_loss`."""
        if metrics.get("val_loss", float("inf")) <= self.loss:
            self._reached = float(metrics["val_loss"])

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Stop between two steps, with exit status 1: `best` has the weights that reached it; no `final` is saved."""
        if self._reached is not None:
            raise TrainingStopped(f"the validation loss is {self._reached:.3f}, at most {self.loss}")
