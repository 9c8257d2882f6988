"""The kernels that can compute attention, and what each one can do, as plain data.

`register_kernel` adds one from outside of this package; `examples/add_an_attention_kernel.py` does it. The choice
between kernels, the setting `attention_backend`, the announcement before training, `litgpt-moe doctor` and the FLOP
counter read this table. Nothing here imports torch, so that reading a configuration stays cheap.

Why operators of torch and not FlexAttention, which returns the log-sum-exp as well: outside of `torch.compile`
FlexAttention writes out all scores, its backward does not exist on CPUs, and every new pattern of documents needs a
block mask. The operators need no compiler. Which of the two is faster on a GPU has not been measured.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

from litgpt_moe_ext.entries import require

# CUDA compute capability, for example (8, 6). Everything else is taken to have (0, 0).
Capability: TypeAlias = tuple[int, int]
Ability: TypeAlias = Literal["mask", "mask_gradient", "window", "documents", "dropout", "gradient"]


class KernelFunctions(Protocol):
    """The two functions of a kernel; a module that defines them will do.

    Attributes:
        forward: `(Inputs, Call) -> Result`, see `calls.py`: the output, the log-sum-exp of the scaled scores, and
            whatever the backward needs besides.
        backward: `(dout_BHTd, Inputs, Result, Call) -> (dq_BHTd, dk_BGSd, dv_BGSd)`. It must recompute probabilities as
            `exp(score - lse)` and take `rowsum(dout * out)` from the output that it is given, because sinks change
            both. Never called where the kernel's abilities lack "gradient".
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Workload(NamedTuple):
    """What a kernel would have to compute, as far as the choice between kernels depends on it.

    Attributes:
        device: Type of the device, "cpu", "cuda" (NVIDIA's GPUs) or "hip" (AMD's).
        capability: Its CUDA compute capability, (0, 0) where it is none of NVIDIA's.
        dtype: Name of the type of q, k and v, such as "bfloat16".
        head_size: Elements of a head, d.
        needs: What is asked for besides causal attention.
    """

    device: str
    capability: Capability
    dtype: str
    head_size: int
    needs: tuple[Ability, ...] = ()


class HeadSizes(NamedTuple):
    """Head sizes of a kernel: multiples of a number, up to a largest one."""

    multiple_of: int = 1
    largest: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """What an attention kernel can do.

    Attributes:
        name: What `attention_backend` calls it.
        summary: What it is, for tables.
        functions: The kernel's functions, or the name of a module that defines them, imported on first use. None for
            the written-out softmax, which `sinks.py` computes without them.
        device: Type of the device that it works on; None for every device.
        dtypes: Lowest compute capability by name of the floating point type.
        head_sizes: Head sizes it takes.
        abilities: What it computes besides plain causal attention. A "mask" is an additive mask tensor that needs no
            gradient; "window" and "documents" are computed within the kernel (without them, attention is cut into
            pieces that the kernel computes one by one).
        preferred_on: Majors of the compute capability on which it precedes all other kernels for attention without
            mask, window, documents and dropout.
        automatic: Whether it is chosen without being named by `attention_backend`.
        switch: Name of torch's switch for it, which `F.scaled_dot_product_attention` heeds and its operators do not: it
            is off after `torch.backends.cuda.enable_{switch}_sdp(False)`, on CPUs too.
        missing: Says what the machine or the installation lacks for it, or None.
        refuses: Says why it cannot compute a workload that everything above allows, or None.
        library: Module whose import creates operators without a FLOP formula in torch; the kernel's module then has a
            `register_flop_formulas(flop_counter)`.
    """

    name: str
    summary: str
    functions: "KernelFunctions | str | None"
    dtypes: Mapping[str, Capability]
    device: str | None = "cuda"
    head_sizes: HeadSizes = HeadSizes()
    abilities: frozenset[Ability] = frozenset()
    preferred_on: tuple[int, ...] = ()
    automatic: bool = True
    switch: str | None = None
    missing: Callable[[], str | None] = lambda: None
    refuses: Callable[[Workload], str | None] = lambda workload: None
    library: str | None = None


def _lacks_module(module: str, remedy: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:  # of a package on the way to it
            found = False
        return None if found else remedy

    return missing


def _lacks_flash() -> str | None:
    import torch

    available = torch.backends.cuda.is_flash_attention_available()
    return None if available else "this PyTorch was built without flash attention"


def _lacks_aotriton() -> str | None:
    import torch
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    # Only torch knows for which chips its kernels were made.
    q_BHTd = torch.empty(1, 1, 8, 64, dtype=torch.float16, device="cuda")
    if can_use_flash_attention(SDPAParams(q_BHTd, q_BHTd, q_BHTd, None, 0.0, True, False)):
        return None
    return "this PyTorch has no flash attention for this GPU (TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 adds some)"


_CUDNN_9_15_0 = 91500


def _lacks_cudnn() -> str | None:
    import torch

    if not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    # A rule of torch's own choice, which a direct call of the operator goes around.
    version = torch.backends.cudnn.version() or 0
    if version <= _CUDNN_9_15_0:
        return (
            f"it needs cuDNN 9.15.1, this is {version}, whose backward pass leaves its memory where the length is no "
            "multiple of 128 (pytorch/pytorch#169849)"
        )
    return None


def _refuses_wide_heads(workload: Workload) -> str | None:
    # The rule of torch's own choice (sdp_utils.cpp), which a direct call of the operator goes around: these cards have
    # too little shared memory for the backward.
    capability, d = workload.capability, workload.head_size
    small = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    if small and "gradient" in workload.needs and (192 < d <= 224 or (d > 224 and "dropout" in workload.needs)):
        return f"it has no gradient for head size {d} on compute capability {capability[0]}.{capability[1]}"
    return None


_HALF = {"float16": (8, 0), "bfloat16": (8, 0)}

# By name, in the order of preference.
KERNELS: dict[str, AttentionKernel] = {}
# The softmax written out, the last resort: it computes everything, on every device.
EAGER = "eager"
_loaded: dict[str, Any] = {}


def register_kernel(kernel: AttentionKernel, before: str = EAGER) -> None:
    """Add an attention kernel, which `attention_backend` can then name and which is chosen where it works.

    Call it before a model is made; `litgpt_moe_ext.extend` says how an installed package does so in every command. A
    kernel that is chosen by default must be right for everything that its data allow.

    Args:
        kernel: What it can do, and its functions.
        before: The kernel that it takes precedence over: `flash_cpu`, the first, for one that is better than all.

    Raises:
        ValueError: If there is another kernel of this name, none to precede, or what is given is no kernel.
    """
    require(kernel.name if isinstance(kernel, AttentionKernel) else "kernel", kernel, AttentionKernel)
    if KERNELS.get(kernel.name) == kernel:
        return  # a script and the entry point of its package may both call this
    if kernel.name in KERNELS:
        raise ValueError(f"attention kernel {kernel.name!r}: a kernel of this name is registered; choose another name")
    if before not in KERNELS:
        raise ValueError(f"before: {before!r} must be one of {', '.join(KERNELS)}")
    _refuse_unusable(kernel)
    others = dict(KERNELS)
    KERNELS.clear()
    for name, other in others.items():
        if name == before:
            KERNELS[kernel.name] = kernel
        KERNELS[name] = other


def _refuse_unusable(kernel: AttentionKernel) -> None:
    # What is misspelt would be a kernel that is never chosen.
    if not isinstance(kernel.dtypes, Mapping) or not isinstance(kernel.abilities, frozenset):
        raise ValueError(f"{kernel.name!r}: dtypes must be a mapping to the lowest capability, abilities a frozenset")
    known = {"dtypes": _DTYPES, "abilities": _EVERYTHING}
    for field, names in known.items():
        if unknown := [name for name in getattr(kernel, field) if name not in names]:
            raise ValueError(f"{kernel.name!r}: {field} has {unknown[0]!r}; known are {', '.join(sorted(names))}")
    functions = ("forward", "backward") if "gradient" in kernel.abilities else ("forward",)
    for function in () if isinstance(kernel.functions, str) else functions:
        if not callable(getattr(kernel.functions, function, None)):
            raise ValueError(f"{kernel.name!r}: functions is {kernel.functions!r}, which has no {function}")


def functions_of(name: str) -> KernelFunctions:
    """Return the functions of a kernel, importing their module on first use."""
    if name not in _loaded:
        functions = KERNELS[name].functions
        if functions is None:
            raise ValueError(f"attention kernel {name!r} has no functions of its own")
        _loaded[name] = importlib.import_module(functions) if isinstance(functions, str) else functions
    return _loaded[name]


def load_functions() -> None:
    """Import the modules of all kernels, because a compiler that traces attention cannot do so."""
    for name, kernel in KERNELS.items():
        if kernel.functions is not None:
            functions_of(name)


_HERE = __name__.rpartition(".")[0]
_EVERYTHING: frozenset[Ability] = frozenset(get_args(Ability))
_DTYPES = ("float64", "float32", "float16", "bfloat16")

for _kernel in (
    AttentionKernel(
        name="flash_cpu",
        summary="PyTorch's flash attention for CPUs",
        functions=f"{_HERE}.flash_cpu",
        device="cpu",
        dtypes=dict.fromkeys(_DTYPES, (0, 0)),
        abilities=frozenset({"mask", "gradient"}),
        switch="flash",
    ),
    AttentionKernel(
        name="flash_attn",
        summary="the `flash-attn` package, 2.7 or newer",
        functions=f"{_HERE}.flash_attn2",
        dtypes=_HALF,
        head_sizes=HeadSizes(multiple_of=8, largest=256),
        abilities=frozenset({"window", "documents", "dropout", "gradient"}),
        missing=_lacks_module("flash_attn.flash_attn_interface", "flash-attn is not installed (uv sync --extra flash)"),
        refuses=_refuses_wide_heads,
        library="flash_attn.flash_attn_interface",
    ),
    AttentionKernel(
        name="flash",
        summary="PyTorch's flash attention for GPUs",
        functions=f"{_HERE}.flash_cuda",
        dtypes=_HALF,
        head_sizes=HeadSizes(multiple_of=8, largest=256),
        abilities=frozenset({"window", "documents", "dropout", "gradient"}),
        switch="flash",
        missing=_lacks_flash,
        refuses=_refuses_wide_heads,
    ),
    # Its window is not read by every version, and its log-sum-exp of packed documents is laid out in other ways.
    AttentionKernel(
        name="flash_hip",
        summary="PyTorch's flash attention for AMD GPUs, AOTriton; not tried on one",
        functions=f"{_HERE}.flash_cuda",
        device="hip",
        dtypes=dict.fromkeys(("float16", "bfloat16"), (0, 0)),
        head_sizes=HeadSizes(multiple_of=8, largest=256),
        abilities=frozenset({"dropout", "gradient"}),
        switch="flash",
        missing=_lacks_aotriton,
    ),
    AttentionKernel(
        name="flash_attn_4",
        summary="the `flash-attn-4` package for Hopper and later, only by name as long as it is a beta",
        functions=f"{_HERE}.flash_attn4",
        dtypes={"float16": (9, 0), "bfloat16": (9, 0)},
        head_sizes=HeadSizes(multiple_of=8, largest=128),
        abilities=frozenset({"window", "documents", "gradient"}),
        automatic=False,
        missing=_lacks_module("flash_attn.cute.interface", "flash-attn-4 is not installed"),
    ),
    AttentionKernel(
        name="cudnn",
        summary="cuDNN's attention, first on Hopper and Blackwell",
        functions=f"{_HERE}.cudnn",
        dtypes=_HALF,
        head_sizes=HeadSizes(multiple_of=8, largest=128),
        abilities=frozenset({"dropout", "gradient"}),
        # As fast as `F.scaled_dot_product_attention` on an H200; the flash kernels above were written for Ampere.
        preferred_on=(9, 10),
        switch="cudnn",
        missing=_lacks_cudnn,
    ),
    AttentionKernel(
        name="efficient",
        summary="PyTorch's memory-efficient attention; repeats the keys of grouped queries",
        functions=f"{_HERE}.efficient",
        dtypes={"float32": (5, 0), "float16": (5, 0), "bfloat16": (8, 0)},
        head_sizes=HeadSizes(multiple_of=8, largest=1024),
        abilities=frozenset({"dropout", "gradient"}),
        switch="mem_efficient",
    ),
    AttentionKernel(
        name=EAGER,
        summary="the softmax written out, the reference for all others",
        functions=None,
        device=None,
        dtypes={},
        abilities=_EVERYTHING,
    ),
):
    KERNELS[_kernel.name] = _kernel

OWN = frozenset(KERNELS)
"""The names of this package's; what others return is checked."""
