"""The attention kernels of this package: what each can do, and where.

Why torch's operators and not FlexAttention, which returns the log-sum-exp too: outside `torch.compile` FlexAttention
materialises all scores, it has no backward on CPUs, and every new pattern of documents needs a block mask. The
operators need no compiler. Which of the two is faster on a GPU has not been measured.
"""

import importlib.util
from collections.abc import Callable

from litgpt_moe_ext.attention.kernels.kernel import DTYPES, EVERY_ABILITY, AttentionKernel, HeadSizes, Workload

EAGER = "eager"
"""The written-out softmax, the last resort: it computes everything, on every device."""


def _lacks_module(module: str, remedy: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:  # of a parent package
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

    # Only torch knows for which chips its kernels were built.
    q_BHTd = torch.empty(1, 1, 8, 64, dtype=torch.float16, device="cuda")
    if can_use_flash_attention(SDPAParams(q_BHTd, q_BHTd, q_BHTd, None, 0.0, True, False)):
        return None
    return "this PyTorch has no flash attention for this GPU (TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 adds some)"


_CUDNN_9_15_0 = 91500


def _lacks_cudnn() -> str | None:
    import torch

    if not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    # A rule of torch's own choice of kernels, which a direct call of the operator bypasses.
    version = torch.backends.cudnn.version() or 0
    if version <= _CUDNN_9_15_0:
        return (
            f"it needs cuDNN 9.15.1, this is {version}, whose backward pass leaves its memory where the length is no "
            "multiple of 128 (pytorch/pytorch#169849)"
        )
    return None


def _refuses_wide_heads(workload: Workload) -> str | None:
    # A rule of torch's own choice of kernels (sdp_utils.cpp), which a direct call of the operator bypasses: these cards
    # have too little shared memory for the backward.
    capability, d = workload.capability, workload.head_size
    small = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    if small and "gradient" in workload.needs and (192 < d <= 224 or (d > 224 and "dropout" in workload.needs)):
        return f"it has no gradient for head size {d} on compute capability {capability[0]}.{capability[1]}"
    return None


_HALF = {"float16": (8, 0), "bfloat16": (8, 0)}
_HERE = __name__.rpartition(".")[0]

# In the order of preference.
OWN_KERNELS = (
    AttentionKernel(
        name="flash_cpu",
        summary="PyTorch's flash attention for CPUs",
        functions=f"{_HERE}.flash_cpu",
        device="cpu",
        dtypes=dict.fromkeys(DTYPES, (0, 0)),
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
    # Not every version reads the window, and the layout of its log-sum-exp of packed documents differs.
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
        abilities=EVERY_ABILITY,
    ),
)
