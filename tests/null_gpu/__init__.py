"""GPUs that are not there: CUDA's runtime, driver, cuBLAS and NCCL, of which only what concerns the host is real.

Its memory is the host's, copies are made, streams, events, captures and their errors are as CUDA documents them. A
kernel that is started is counted and does nothing. So PyTorch, Triton and this package do all that the host of a GPU
does, and a test sees how many kernels are started, what waits, and what a capture refuses. With
`tests.null_gpu.computing` the CPU does the work of the kernels in the same memory, and numbers are right as well.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("library")


def missing() -> str | None:
    """Return what is missing to build it, if anything."""
    if (torch.version.cuda or "").split(".")[0] != "13":
        return "it answers for CUDA 13"
    if shutil.which("gcc") is None:
        return "there is no C compiler"
    if not _headers():
        return "CUDA's headers are not installed"
    return None


def _headers() -> list[Path]:
    """Return where the headers of CUDA and NCCL are: in their wheels, and in Triton's the few that lack there."""
    specs = [spec for name in ("nvidia", "triton") if (spec := importlib.util.find_spec(name)) is not None]
    roots = [Path(root) for spec in specs for root in spec.submodule_search_locations or ()]
    headers = ("cuda_runtime_api.h", "nccl.h")
    return [file.parent for root in roots for header in headers for file in root.glob(f"**/include/{header}")]


def build(folder: Path) -> Path:
    """Compile it.

    Args:
        folder: Where it is to be.
    """
    library = folder / "libcuda.so.1"
    includes = [f"-I{path}" for path in _headers()]
    libraries = ["-ldl", "-lm", "-lpthread", "-lrt"]
    flags = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, *includes, "-o", library, *_LIBRARY.glob("*.c"), *libraries], check=True)
    return library


def environment(library: Path, capability: int, mib: int = 8 * 1024, devices: int = 1) -> dict[str, str]:
    """Return the variables with which a process finds the GPU.

    Args:
        library: What `build` returned.
        capability: Compute capability, 89 for 8.9.
        mib: Size of its memory, MiB.
        devices: How many of them there are.
    """
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "NULL_GPU_CAPABILITY": str(capability),
        "NULL_GPU_MIB": str(mib),
        "NULL_GPU_DEVICES": str(devices),
        # Triton keeps what it compiled, and the module with which it reaches the driver.
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
    }
