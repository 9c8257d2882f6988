"""The device type that a run trains on, and its default precision."""

import os
import shutil

import torch


def accelerator_here() -> str:
    """Return the device type that training will use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def unused_gpu() -> str | None:
    """Return why torch cannot use the NVIDIA GPU of this machine; None if it can, or there is none, or it is hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # The driver brings this program, on Windows too.
    if visible in ("", "-1") or torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    if torch.version.cuda is None:
        return (
            "torch was built without CUDA, as PyPI's is for Windows (uv pip install --reinstall-package torch torch "
            "--torch-backend=auto, then uv run --no-sync)"
        )
    reason = f"torch was built for CUDA {torch.version.cuda}, for which the driver may be too old"
    if visible is not None:
        reason = f"CUDA_VISIBLE_DEVICES is {visible!r}, which may name none of its GPUs; or {reason}"
    return reason


def default_precision(accelerator: str) -> str:
    """Return the precision for a recipe that names none.

    Args:
        accelerator: Device type.
    """
    if accelerator != "cuda":
        return "32-true"  # bfloat16 is much slower on CPUs without instructions for it
    # By default torch also counts GPUs before Ampere, which emulate bfloat16 in float32.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
