"""The device type that a run trains on, and its default precision."""

import torch


def accelerator_here() -> str:
    """Return the device type that training will use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_precision(accelerator: str) -> str:
    """Return the precision for a recipe that names none.

    Args:
        accelerator: Device type.
    """
    if accelerator != "cuda":
        return "32-true"  # bfloat16 is much slower on CPUs without instructions for it
    # By default torch also counts GPUs before Ampere, which emulate bfloat16 in float32.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
