"""Which kernel computes given tensors.

Shape legend: B batch, T queries, S keys, H query heads, G key/value heads, d head size.
"""

import functools
import logging
import warnings

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels.kernel import Ability, AttentionKernel, Capability, Workload
from litgpt_moe_ext.attention.kernels.own import EAGER
from litgpt_moe_ext.attention.kernels.registry import KERNELS
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels.compiled import assume_constant_result
from litgpt_moe_ext.kernels.gpu import vendor_kind

_log = logging.getLogger(__name__)

FALLBACK_COST = "no flash kernel can do this, so memory and time grow with the square of the sequence length"

_DTYPE_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
_LACKS: dict[Ability, str] = {
    "mask": "it takes no mask tensor",
    "mask_gradient": "it returns no gradient of the mask",
    "window": "it has no sliding window",
    "documents": "it cannot keep documents apart",
    "dropout": "it has no dropout",
    "gradient": "it has no gradient",
}


def choose_kernel(
    q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, needs: tuple[Ability, ...] = (), forced: str | None = None
) -> str:
    """Pick the fastest kernel that gives correct results for these tensors, and log it once.

    Args:
        q_BHTd: Queries.
        k_BGSd: Keys.
        v_BGSd: Values.
        needs: Abilities needed besides causal attention; "gradient" is determined here.
        forced: The only kernel allowed (`attention_backend` in the model configuration).

    Returns:
        A name in `KERNELS`. On the meta device it is "eager", whose FLOPs are counted as those of
        `F.scaled_dot_product_attention`.

    Raises:
        SettingsError: If the forced kernel cannot do it; the message says why.
    """
    if q_BHTd.is_meta:
        return EAGER
    if torch.is_grad_enabled() and (q_BHTd.requires_grad or k_BGSd.requires_grad or v_BGSd.requires_grad):
        needs = (*needs, "gradient")
    device = q_BHTd.device
    dtype = _DTYPE_NAMES.get(q_BHTd.dtype, "other")
    workload = Workload(vendor_kind(device), capability_of(device), dtype, q_BHTd.size(-1), needs)
    irregular = _irregularity(q_BHTd, k_BGSd, v_BGSd)
    if irregular is None:
        chosen = _choose(*workload, forced)
    elif forced is None or forced == EAGER:
        chosen = EAGER
    else:
        raise SettingsError(_refusal(forced, irregular))
    if chosen == "cudnn" and q_BHTd.size(2) == 1:
        # For one query on Blackwell, some versions return wrong numbers (pytorch/pytorch#193893), others no gradient.
        chosen = EAGER
    # Without a kernel for windows and documents, attention is cut into pieces, each of which gets here. For a handful
    # of queries to a cache, a matrix product, the written-out softmax is best.
    is_final = chosen != EAGER or not ("window" in needs or "documents" in needs)
    if is_final and not torch.compiler.is_compiling() and q_BHTd.size(2) > 1:
        _announce(chosen, workload.dtype, workload.device, is_forced=forced is not None)
    return chosen


def choose(workload: Workload, forced: str | None = None) -> str:
    """Pick the kernel for a workload.

    Args:
        workload: The work.
        forced: The only kernel allowed.

    Returns:
        A name in `KERNELS`: the forced one, or else the first in the order of preference that can do it.

    Raises:
        SettingsError: If the forced kernel cannot do it.
    """
    if forced is not None:
        reason = obstacle(KERNELS[forced], workload)
        if reason is not None:
            raise SettingsError(_refusal(forced, reason))
        return forced
    kernels = KERNELS.values()
    if workload.device == "cuda" and (not workload.needs or workload.needs == ("gradient",)):
        major = workload.capability[0]
        kernels = sorted(kernels, key=lambda kernel: major not in kernel.preferred_on)
    for kernel in kernels:
        if kernel.automatic and obstacle(kernel, workload) is None:
            return kernel.name
    return EAGER


@assume_constant_result
def _choose(
    device: str, capability: Capability, dtype: str, head_size: int, needs: tuple[Ability, ...], forced: str | None
) -> str:
    # A compiler takes the result as a constant; a named tuple would not reach this function intact.
    return choose(Workload(device, capability, dtype, head_size, needs), forced)


def obstacle(kernel: AttentionKernel, workload: Workload) -> str | None:
    """Return what keeps a kernel from computing a workload, or None."""
    if kernel.device is not None and workload.device != kernel.device:
        return f"it works on {kernel.device} tensors, these are on {workload.device}"
    for need in workload.needs:
        if need not in kernel.abilities:
            return _LACKS[need]
    if kernel.device is None:
        return None
    if workload.dtype not in kernel.dtypes:
        return f"it has no {workload.dtype}"
    lowest = kernel.dtypes[workload.dtype]
    if workload.capability < lowest:
        return f"it needs compute capability {lowest[0]}.{lowest[1]} for {workload.dtype}"
    sizes, size = kernel.head_sizes, workload.head_size
    if size > sizes.largest or size % sizes.multiple_of:
        return f"its head size must be a multiple of {sizes.multiple_of} up to {sizes.largest}, this is {size}"
    if kernel.switch is not None and not getattr(torch.backends.cuda, f"{kernel.switch}_sdp_enabled")():
        return f"torch.backends.cuda.enable_{kernel.switch}_sdp has switched it off"
    return kernel.refuses(workload) or _missing(kernel.name)


@assume_constant_result
def capability_of(device: torch.device) -> Capability:
    """Return the compute capability of one of NVIDIA's GPUs, (0, 0) for everything else."""
    return torch.cuda.get_device_capability(device) if vendor_kind(device) == "cuda" else (0, 0)


@functools.cache
def _missing(name: str) -> str | None:
    return KERNELS[name].missing()


def _irregularity(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> str | None:
    # Inputs that only the written-out softmax takes.
    if not q_BHTd.dtype == k_BGSd.dtype == v_BGSd.dtype:
        return f"q, k and v have different types ({q_BHTd.dtype}, {k_BGSd.dtype}, {v_BGSd.dtype})"
    # The CPU kernel divides by the sequence length, and returns wrong numbers for other head sizes or strides.
    if not q_BHTd.size(-1) == k_BGSd.size(-1) == v_BGSd.size(-1):
        return "q, k and v have different head sizes"
    if not all(x.stride(-1) == 1 for x in (q_BHTd, k_BGSd, v_BGSd)):
        return "the elements of a head must be contiguous in q, k and v"
    if min(q_BHTd.size(2), k_BGSd.size(2), q_BHTd.size(0)) == 0:
        return "there are no tokens"
    return None


def _refusal(forced: str, reason: str) -> str:
    return (
        f"attention_backend: {forced!r} cannot be used here: {reason}; leave it out, and a kernel that works is chosen"
    )


def fallback_is_known(dtype: torch.dtype, device: torch.device) -> None:
    """Give no warning of the written-out softmax, which the caller has announced for these tensors."""
    with warnings.catch_warnings(action="ignore"):
        _announce(EAGER, _DTYPE_NAMES[dtype], vendor_kind(device), is_forced=False)


@functools.cache
def _announce(kernel: str, dtype: str, device: str, is_forced: bool) -> None:
    # Cached, so that a run logs it once.
    line = f"attention: {kernel} for torch.{dtype} on {device} ({'forced' if is_forced else 'chosen'})"
    _log.info(line)
    if kernel == EAGER and not is_forced:
        warnings.warn(f"{line}: {FALLBACK_COST}", stacklevel=4)
