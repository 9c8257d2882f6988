"""How and where the package's Triton kernels are launched; does not import Triton."""

import functools
import importlib.util
import os
import subprocess
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from litgpt_moe_ext.errors import one_line
from litgpt_moe_ext.kernels.gpu import amd_chip, triton_knows, vendor_kind


@functools.cache
def triton_installed() -> bool:
    """Return whether Triton is installed; on Windows it is a package of its own."""
    return importlib.util.find_spec("triton") is not None


def triton_obstacle() -> str | None:
    """Return what keeps Triton from starting any kernel on this machine's GPUs, or None.

    As long as the process has not used a GPU, only whether Triton is installed.
    """
    if not triton_installed():
        return "Triton is not installed (on Windows: pip install triton-windows)"
    # Before that it would be too early to ask: processes may still be forked, and the GPU meant may be elsewhere.
    return _setup_obstacle() if torch.cuda.is_initialized() else None


@functools.cache
def _setup_obstacle() -> str | None:
    """Set up Triton as its first launch would: it compiles a module in C, and keeps that and kernels in a folder."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except subprocess.CalledProcessError as error:
        compiler = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        return (
            f"Triton's own C code cannot be compiled by {compiler}, whose message stands above; often Python's headers "
            "are missing (python3-dev)"
        )
    except OSError as error:
        return (
            f"Triton cannot keep what it compiles ({error.filename}: {error.strerror}); set TRITON_CACHE_DIR to a "
            "folder that can be written"
        )
    except Exception as error:  # of many kinds, assertions among them
        if "C compiler" in str(error):
            return "Triton needs a C compiler, and there is none; install gcc, or name one in CC"
        return f"Triton cannot be set up: {one_line(error)}"
    return None


@functools.cache
def triton_works_on(device: torch.device) -> bool:
    """Return whether Triton works and has kernels for this card: most of AMD's, and NVIDIA's since Turing."""
    if vendor_kind(device) == "hip":
        known = triton_knows(amd_chip(device))
    else:
        known = torch.cuda.get_device_capability(device) >= (7, 5)
    return known and triton_obstacle() is None


def operators_are_unwatched(x: Tensor) -> bool:
    """Return whether a Triton kernel may replace torch's operators on `x`: on a GPU, with nothing intercepting them."""
    # A compiler fuses the operators itself. Dispatch modes (selective activation checkpointing, the FLOP counter, fake
    # tensors) do not see a Triton kernel, and a tensor subclass may have no memory for it.
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and type(x) is Tensor
        and not is_in_torch_dispatch_mode()
        and triton_works_on(x.device)
    )


def ceil_div(a: int, b: int) -> int:
    """Return `a / b`, rounded up. Triton's own function takes five microseconds of host time."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`; `n` is at least 1."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], warps: int, stages: int = 1) -> None:
    """Launch a kernel on the device of its tensors; an empty grid does nothing.

    Args:
        kernel: A function made by `triton.jit`.
        grid: Number of programs in each direction.
        arguments: The kernel's arguments, in order.
        warps: Warps of each program.
        stages: How many loads of a loop are in flight at once.
    """
    if 0 in grid:
        return
    device = _device_of(arguments)
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    else:
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def _device_of(arguments: tuple[Any, ...]) -> torch.device:
    first = arguments[0]
    return (first[0] if isinstance(first, tuple) else first).device
