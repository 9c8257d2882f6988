"""Whose GPU a device is: `torch.device` says `cuda` for AMD's as well."""

import functools

import torch

# Chips that PyTorch runs on and for which Triton has no matrix products; by the beginning of their names.
_WITHOUT_TRITON = ("gfx8", "gfx90c", "gfx900", "gfx902", "gfx940", "gfx941", "gfx10")


def vendor_kind(device: torch.device) -> str:
    """Return the type of a device, with `hip` for AMD's GPUs."""
    return "hip" if device.type == "cuda" and torch.version.hip is not None else device.type


@functools.cache
def amd_chip(device: torch.device) -> str:
    """Return AMD's name of a GPU, such as `gfx942`, without the features behind it."""
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def triton_knows(chip: str) -> bool:
    """Return whether Triton has matrix products for one of AMD's chips."""
    return not chip.startswith(_WITHOUT_TRITON)
