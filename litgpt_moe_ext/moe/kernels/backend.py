"""What a backend of the routed experts is, and where it is preferred, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where experts are computed, and in which dtype and size.

    Attributes:
        device: `cpu`, `cuda`, `hip` (AMD), `mps` or another type of device.
        capability: Compute capability of an NVIDIA card, otherwise None.
        dtype: In which matrices are multiplied.
        compiling: Whether `torch.compile` traces the layer.
        widths: Model width, and hidden width of one expert.
        chip: AMD's name of its card, such as `gfx942`.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    compiling: bool
    widths: tuple[int, int]
    chip: str = ""


@dataclass(frozen=True)
class ExpertBackend:
    """An implementation of the routed experts.

    Attributes:
        name: Its name in configurations.
        function: Takes tokens (T, D), their routing, the weights, and what happens between the projections; returns the
            weighted sum of the experts' outputs, (T, D) in the dtype of the tokens. Where the routing has `real_T`,
            the other tokens are padding: their values are arbitrary, their expert is E, they are not counted, and their
            outputs and gradients are not read.
        obstacle: Returns why it cannot work at a place, as the end of a sentence, or None if it can.
        adds: Whether `function` takes one more argument, (T, D) in the dtype of the tokens, and adds it to the sum.
    """

    name: str
    function: Callable[..., Tensor]
    obstacle: Callable[[Place], str | None]
    adds: bool = False


@dataclass(frozen=True)
class Preference:
    """Which backends are preferred where; conditions that are None always hold.

    Attributes:
        backends: Names, best first.
        device: Type of the device.
        majors: Major numbers of the compute capability.
        dtypes: In which matrices are multiplied.
        compiling: Whether `torch.compile` traces the layer.
    """

    backends: tuple[str, ...]
    device: str | None = None
    majors: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    compiling: bool | None = None

    def covers(self, place: Place) -> bool:
        """Return whether the conditions hold at `place`."""
        return (
            self.device in (None, place.device)
            and (self.majors is None or (place.capability is not None and place.capability[0] in self.majors))
            and (self.dtypes is None or place.dtype in self.dtypes)
            and self.compiling in (None, place.compiling)
        )
