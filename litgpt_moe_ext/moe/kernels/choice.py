"""Which backend computes the routed experts: the first preferred one that can work at a place."""

import warnings

import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels.compiled import assume_constant_result
from litgpt_moe_ext.kernels.gpu import amd_chip, vendor_kind
from litgpt_moe_ext.moe.kernels.backend import Place
from litgpt_moe_ext.moe.kernels.registry import BACKENDS, CHOSEN, PREFERENCES


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
    place = Place(kind, capability, dtype, compiling, widths, chip)
    chosen = CHOSEN.get((place, forced))
    if chosen is None:
        chosen = CHOSEN[place, forced] = choose(place, forced)
    return chosen


def choose(place: Place, forced: str | None = None) -> str:
    """Pick the backend for a place, as `backend_for` does."""
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
