"""The gradient scaler of float16 training, in checkpoints."""

from typing import Any

from lightning.fabric.plugins.precision import Precision

from litgpt_moe_ext.training.callback import Callback


class ScalerState(Callback):
    """Keep the state of a gradient scaler in the checkpoints.

    Args:
        precision: Fabric's precision plugin.
    """

    def __init__(self, precision: Precision) -> None:
        self._precision = precision

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler."""
        return self._precision.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state of the scaler."""
        self._precision.load_state_dict(state)
