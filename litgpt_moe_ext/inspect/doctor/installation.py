"""The installed software, and this machine's devices."""

import importlib.metadata
import platform
from collections.abc import Iterator

from litgpt_moe_ext.inspect.doctor.finding import Finding, with_warnings


def versions() -> Iterator[Finding]:
    """Yield the versions of installed packages."""
    from litgpt_moe_ext.host.seams import TESTED_LITGPT

    names = ("litgpt-moe-ext", "litgpt", "torch", "lightning", "transformers", "lm-eval")
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    yield Finding("versions", "good", f"Python {platform.python_version()}, {found}")
    if _version("litgpt") != TESTED_LITGPT:
        text = (
            f"litgpt {_version('litgpt')} is installed; tested is {TESTED_LITGPT}: pip install litgpt=={TESTED_LITGPT}"
        )
        yield Finding("litgpt", "note", text)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def devices() -> Iterator[Finding]:
    """Yield the CPU and the GPUs."""
    import psutil
    import torch

    from litgpt_moe_ext.kernels.gpu import defect
    from litgpt_moe_ext.training.parallel.accelerator import unused_gpu

    memory = psutil.virtual_memory()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "CPU",
        "good",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {capability}, "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free",
    )
    if not torch.cuda.is_available():
        cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        reason = unused_gpu() or f"torch was built {cuda}"
        yield Finding("GPU", "note", f"none that torch can use; everything runs on the CPU: {reason}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        if (reason := defect(torch.device("cuda", index))) is None:
            yield Finding(f"GPU {index}", "good", text)
            continue
        built = f"torch {torch.__version__} has kernels for {', '.join(torch.cuda.get_arch_list())}"
        yield Finding(f"GPU {index}", "problem", f"{text}, does not work: {reason} ({built})")


def links(matrix: str | None) -> list[Finding]:
    """Return what the connections of several GPUs mean for training on them.

    Args:
        matrix: Output of `nvidia-smi topo -m`; None if it does not run.
    """
    from litgpt_moe_ext.training.parallel import topology

    return [Finding("links", "note", line) for line in topology.report(matrix or "")]


def links_here() -> list[Finding]:
    """Return the same for this machine."""
    import torch

    from litgpt_moe_ext.training.parallel import topology

    return links(topology.read_matrix()) if torch.cuda.device_count() > 1 else []


def kernels() -> Iterator[Finding]:
    """Yield which kernels models of usual sizes would get."""
    import torch

    from litgpt_moe_ext.attention.kernels.choice import capability_of, choose
    from litgpt_moe_ext.attention.kernels.kernel import Workload
    from litgpt_moe_ext.attention.kernels.own import EAGER
    from litgpt_moe_ext.kernels.gpu import vendor_kind
    from litgpt_moe_ext.moe.kernels.choice import backend_for

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in dtypes}
    chosen, warned = with_warnings(lambda: {name: backend_for(device, key, (64, 64)) for key, name in names.items()})
    text = ", ".join(f"backend {backend} for {name}" for name, backend in chosen.items())
    yield Finding("experts", "note" if "loop" in chosen.values() else "good", text + warned)
    capability = capability_of(device)
    chosen = {
        name: choose(Workload(vendor_kind(device), capability, name, 64, ("gradient",))) for name in names.values()
    }
    text = ", ".join(f"kernel {kernel} for {name}" for name, kernel in chosen.items())
    yield Finding("attention", "note" if EAGER in chosen.values() else "good", f"{text}, with sinks")


def compiler() -> Finding:
    """Return whether torch.compile could work."""
    from litgpt_moe_ext.training.compilation import obstacle
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here

    reason = obstacle(accelerator_here())
    text = f"torch.compile cannot work: {reason}" if reason else "torch.compile has the compiler it needs"
    return Finding("compile", "note" if reason else "good", text)
