"""Which implementation computes the routed experts: what each one can do, and which is preferred where.

| name          | implementation                                                            | waits for the GPU   |
| ------------- | ------------------------------------------------------------------------- | ------------------- |
| `grouped_mm`  | torch's grouped product, native in bfloat16 on capabilities 9.x and 10.x  | where it is emulated |
| `triton`      | the package's own kernels, from compute capability 7.5; on Hopper in      | no                  |
|               | bfloat16 the gradients of wide weights are torch's grouped product        |                     |
| `grouped_cpu` | one expert after the other on a CPU, with a backward pass written by hand |                     |
| `loop`        | one expert after the other with ordinary operators, everywhere            | in every layer      |

`BACKENDS` says what each can do, `PREFERENCES` what is preferred where; the first that can do it is chosen. A backend
that `register_backend` adds is chosen, announced and forced (`expert_backend` in the model configuration) like the
package's own.
"""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.entries import require
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels import launch
from litgpt_moe_ext.kernels.compiled import assume_constant_result
from litgpt_moe_ext.kernels.gpu import amd_chip, triton_knows, vendor_kind
from litgpt_moe_ext.moe.kernels.cpu import grouped_cpu_experts
from litgpt_moe_ext.moe.kernels.grouped import grouped_mm_experts, triton_experts
from litgpt_moe_ext.moe.kernels.loop import loop_experts
from litgpt_moe_ext.moe.registry import EXPERT_BACKENDS


class Place(NamedTuple):
    """Where and in what experts are computed.

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
            the other tokens are padding: their numbers may be anything, their expert is E, they are not among the
            counts, and what is returned for them, and as their gradient, is not read.
        obstacle: Returns what keeps it from working at a place, as the end of a sentence, or None.
        adds: Whether `function` takes one more argument, (T, D) in the dtype of the tokens, which it adds to the sum.
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


def _needs_cpu(place: Place) -> str | None:
    return None if place.device == "cpu" else f"it works on cpu tensors, these are on {place.device}"


def _needs_strides(place: Place) -> str | None:
    if place.dtype.itemsize >= 8:
        return f"it has no {place.dtype}"
    if any(width * place.dtype.itemsize % 16 for width in place.widths):
        return f"it needs widths in multiples of 16 bytes, not {place.widths[0]} and {place.widths[1]}"
    return None


def _needs_triton(place: Place) -> str | None:
    interpreted = place.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if place.device not in ("cuda", "hip") and not interpreted:
        return f"it works on cuda tensors (on cpu ones under TRITON_INTERPRET=1), these are on {place.device}"
    if not launch.triton_installed():
        return "Triton is not installed (on Windows: pip install triton-windows)"
    if place.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {place.dtype}"
    if not triton_knows(place.chip):
        return f"it has no products for {place.chip}"
    if place.capability is not None and place.capability < (7, 5):
        return f"it needs compute capability 7.5, this card has {place.capability[0]}.{place.capability[1]}"
    if place.capability is not None and place.capability < (8, 0) and place.dtype == torch.bfloat16:
        return "bfloat16 needs compute capability 8.0 (use precision 16-mixed)"
    return None


BACKENDS: dict[str, ExpertBackend] = {
    backend.name: backend
    for backend in (
        ExpertBackend("loop", loop_experts, lambda place: None),
        ExpertBackend("grouped_cpu", grouped_cpu_experts, _needs_cpu),
        ExpertBackend("grouped_mm", grouped_mm_experts, _needs_strides, adds=True),
        ExpertBackend("triton", triton_experts, _needs_triton, adds=True),
    )
}

OWN = frozenset(BACKENDS)
"""The names of this package's; what others return is checked."""

# The first row that covers a place decides. The loops ask how many rows each expert has, which no compiler can see.
PREFERENCES: list[Preference] = [
    # Measured on an H200, where Triton saves the copies of rows; nobody has measured the data centre's Blackwell yet.
    Preference(("triton", "grouped_mm", "loop"), device="cuda", majors=(9,), dtypes=(torch.bfloat16,)),
    Preference(("grouped_mm", "triton", "loop"), device="cuda", majors=(10,), dtypes=(torch.bfloat16,)),
    Preference(("triton", "loop"), device="cuda"),
    Preference(("triton", "loop"), device="hip"),
    Preference(("grouped_mm", "loop"), device="cpu", compiling=True),
    Preference(("grouped_cpu", "loop"), device="cpu"),
    Preference(("loop",)),
]


def register_backend(backend: ExpertBackend, *preferences: Preference) -> None:
    """Make a backend known under its name, and preferred where `preferences` say, before all others.

    Raises:
        ValueError: If another one has the name, or what is given is no backend and no preference of known ones.
    """
    require(backend.name if isinstance(backend, ExpertBackend) else "backend", backend, ExpertBackend)
    name = backend.name
    if BACKENDS.get(name, backend) != backend:
        raise ValueError(f"{name!r} is registered already; choose another name")
    for field in ("function", "obstacle"):
        if not callable(getattr(backend, field)):
            raise ValueError(f"{name!r}: {field} is {getattr(backend, field)!r}; it must be a function")
    for preference in preferences:
        require(name, preference, Preference)
        known = [*BACKENDS, name]
        given = preference.backends
        if not isinstance(given, (tuple, list)) or any(each not in known for each in given):
            raise ValueError(f"{name!r}: backends is {given!r}; it must be a tuple of names of {', '.join(known)}")
    if name not in BACKENDS:
        EXPERT_BACKENDS.append(name)
    BACKENDS[name] = backend
    # A script and the entry point of its package may both call this.
    PREFERENCES[:0] = [preference for preference in preferences if preference not in PREFERENCES]
    choose_backend.cache_clear()


def check_sums(name: str, y_TD: object, x_TD: Tensor, learns: bool) -> None:
    """Raise if what a backend of another package returns is not what it is to return, as numbers cannot tell.

    Args:
        name: Its name.
        y_TD: What it returns.
        x_TD: The tokens that it was given.
        learns: Whether the tokens or the weights need a gradient.
    """
    if not isinstance(y_TD, Tensor):
        raise TypeError(f"expert backend {name!r} returns a {type(y_TD).__name__}; it must return a tensor")
    if y_TD.shape != x_TD.shape or y_TD.dtype != x_TD.dtype:
        raise ValueError(
            f"expert backend {name!r} returns {tuple(y_TD.shape)} in {y_TD.dtype}; (T, D) is {tuple(x_TD.shape)}, in "
            f"the {x_TD.dtype} of the tokens"
        )
    if learns and not y_TD.requires_grad:
        raise ValueError(
            f"expert backend {name!r} returns sums without a gradient; tokens and experts need one to learn"
        )


@assume_constant_result
def backend_for(
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    compiling: bool = False,
    forced: str | None = None,
) -> str:
    """Return the name of the backend that computes experts; a loop that waits for the device is announced once.

    Args:
        device: Device of the tokens.
        dtype: In which matrices are multiplied.
        widths: Model width, and hidden width of one expert.
        compiling: Whether `torch.compile` traces the layer.
        forced: The only backend allowed (`expert_backend` in the model configuration).

    Raises:
        SettingsError: If the forced backend is unknown or cannot work there; the message says why.
    """
    kind = vendor_kind(device)
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    chip = amd_chip(device) if kind == "hip" else ""
    return choose_backend(Place(kind, capability, dtype, compiling, widths, chip), forced)


@functools.cache
def choose_backend(place: Place, forced: str | None = None) -> str:
    """Return the name of the backend for a place, as `backend_for` does."""
    if forced is not None:
        if forced not in BACKENDS:
            raise SettingsError(f"expert_backend: {forced!r} must be one of {', '.join(BACKENDS)}")
        reason = BACKENDS[forced].obstacle(place)
        if reason is not None:
            raise SettingsError(
                f"expert_backend: {forced!r} cannot be used here: {reason}. Leave expert_backend out, and a backend "
                "that works is chosen."
            )
        return forced
    names = next(preference.backends for preference in PREFERENCES if preference.covers(place))
    obstacles = {name: BACKENDS[name].obstacle(place) for name in names}
    chosen = next((name for name, reason in obstacles.items() if reason is None), "loop")
    if chosen == "loop" and place.device in ("cuda", "hip"):
        warnings.warn(
            "The GPU computes the experts one after the other, and the host waits for it in every MoE layer: "
            + "; ".join(f"{name} cannot be used because {reason}" for name, reason in obstacles.items() if reason)
            + ".",
            RuntimeWarning,
            stacklevel=5,
        )
    return chosen
