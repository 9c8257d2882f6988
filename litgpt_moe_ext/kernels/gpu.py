"""The vendor of a GPU: `torch.device` says `cuda` for AMD's as well."""

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
