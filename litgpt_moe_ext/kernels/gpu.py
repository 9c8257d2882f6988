"""Kinds of GPUs, whose vendor `torch.device` does not tell, and whether one computes at all."""

import functools

import torch

# Prefixes of the names of chips on which PyTorch runs but Triton has no matrix products.
_WITHOUT_TRITON = ("gfx8", "gfx90c", "gfx900", "gfx902", "gfx940", "gfx941", "gfx10")


def vendor_kind(device: torch.device) -> str:
    """Return the type of a device, with `hip` for AMD's GPUs."""
    return "hip" if device.type == "cuda" and torch.version.hip is not None else device.type


@functools.cache
def amd_chip(device: torch.device) -> str:
    """Return AMD's name of a GPU, such as `gfx942`, without the list of features."""
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def triton_knows(chip: str) -> bool:
    """Return whether Triton has matrix products for one of AMD's chips."""
    return not chip.startswith(_WITHOUT_TRITON)


def defect(device: torch.device) -> str | None:
    """Return why torch cannot compute on a device, or None if it can.

    It starts a kernel, as torch makes memory on cards that are too old or too new for all of its kernels.
    """
    # torch raises RuntimeError for meta, which holds no values, and for a device that is missing, is full or lacks its
    # driver; AssertionError or ImportError if it was built without the device type, or lacks its package.
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # Of CUDA's errors, the other lines say how to debug them.
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None
