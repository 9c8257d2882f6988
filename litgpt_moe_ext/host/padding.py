"""Rows with padding through LitGPT's pretraining loop.

The loop takes one tensor per batch and cuts inputs and targets from it, so a padded target (-100, which the loss
ignores) is also an input, for which there is no embedding. Padding stands at the end of a row, where causal attention
keeps it from every token that counts: any id will do. Models then read 0 in its place.

Installed by data modules that pad, when they do: other runs keep the error about a negative id.
"""

from functools import wraps
from typing import Any

from torch import Tensor


def accept_padding() -> None:
    """Let `litgpt.model.GPT` take negative ids as inputs; their outputs are meaningless."""
    import litgpt.model

    original = litgpt.model.GPT.forward
    if getattr(original, "accepts_padding", False):
        return

    @wraps(original)
    def forward(self: Any, idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, idx.clamp_min(0), *args, **kwargs)

    vars(forward)["accepts_padding"] = True
    litgpt.model.GPT.forward = forward
