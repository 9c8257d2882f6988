"""Which kernel computes the attention: what each one can do, and who chooses.

| name         | kernel                                                   | window, documents | masks |
| ------------ | -------------------------------------------------------- | ----------------- | ----- |
| `flash_cpu`  | PyTorch's flash attention for CPUs                       | by pieces         | yes   |
| `flash_attn` | the `flash-attn` package (2.7 or newer), where installed | in the kernel     | no    |
| `flash`      | PyTorch's flash attention for GPUs                       | in the kernel     | no    |
| `cudnn`      | cuDNN's attention                                        | by pieces         | no    |
| `efficient`  | PyTorch's memory-efficient attention; repeats keys       | by pieces         | no    |
| `eager`      | the softmax written out, the reference for all others    | by pieces         | yes   |

Masks mean an explicit mask tensor; the causal mask needs none. The GPU kernels are unmeasured.

Shape suffixes: B batch, H query heads, G key/value heads, T queries, S keys, D head size.
"""

import functools
import importlib.util
import logging
import warnings

import torch

from litgpt_moe_ext.config.fields import ATTENTION_BACKENDS as BACKENDS

_log = logging.getLogger(__name__)

# The order of preference.
_FAST = tuple(name for name in BACKENDS if name != "eager")
# These take a window, and documents as offsets, without cutting the sequence into pieces.
FUSED_PATTERNS = ("flash_attn", "flash")
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {
    "flash_cpu": (torch.float64, torch.float32, *_HALF),
    "flash_attn": _HALF,
    "flash": _HALF,
    "cudnn": _HALF,
    "efficient": (torch.float32, *_HALF),
}
# Lowest compute capability, largest head size, and the number that the head size must be a multiple of.
_CUDA_LIMITS = {
    "flash_attn": ((8, 0), 256, 8),
    "flash": ((8, 0), 256, 8),
    "cudnn": ((8, 0), 128, 8),
    "efficient": ((5, 0), 1024, 8),
}


def choose_backend(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    forced: str | None = None,
) -> str:
    """Pick the fastest kernel that gives right results for these tensors, and say once which one it is.

    Args:
        q_BHTD: Queries.
        k_BGSD: Keys.
        v_BGSD: Values.
        mask: An explicit mask that goes with them.
        dropout: Probability of dropping an attention weight.
        forced: The only kernel allowed (`attention_backend` in the model configuration).

    Returns:
        One of `BACKENDS`. On the meta device it is `"eager"`, which counts as many operations there as
        `F.scaled_dot_product_attention`.

    Raises:
        ValueError: If the forced kernel cannot do it; the message says why.
    """
    if q_BHTD.is_meta:
        return "eager"
    if forced is not None:
        reason = obstacle(forced, q_BHTD, k_BGSD, v_BGSD, mask, dropout)
        if reason is not None:
            raise ValueError(
                f"attention_backend: {forced!r} cannot be used here: {reason}. Leave attention_backend out, and a "
                "backend that works is chosen."
            )
        chosen = forced
    else:
        usable = (name for name in _FAST if obstacle(name, q_BHTD, k_BGSD, v_BGSD, mask, dropout) is None)
        chosen = next(usable, "eager")
    # A handful of queries to a cache is a matrix product; there the written-out softmax is no fallback.
    if not torch.compiler.is_compiling() and q_BHTD.size(2) > 1:
        _announce(chosen, forced is not None, q_BHTD.device.type, q_BHTD.dtype, dropout > 0)
    return chosen


def obstacle(
    backend: str,
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Tell what keeps a kernel from computing these tensors, or return `None` if nothing does."""
    if backend == "eager":
        return None
    device_type = "cpu" if backend == "flash_cpu" else "cuda"
    if q_BHTD.device.type != device_type:
        return f"it works on {device_type} tensors, these are on {q_BHTD.device.type}"
    if q_BHTD.dtype not in _DTYPES[backend]:
        return f"it has no {q_BHTD.dtype}"
    if not q_BHTD.dtype == k_BGSD.dtype == v_BGSD.dtype:
        return f"q, k and v have different types ({q_BHTD.dtype}, {k_BGSD.dtype}, {v_BGSD.dtype})"
    # The CPU kernel divides by the sequence length, and returns wrong numbers for other head sizes or strides.
    if not q_BHTD.size(-1) == k_BGSD.size(-1) == v_BGSD.size(-1):
        return "q, k and v have different head sizes"
    if not all(x.stride(-1) == 1 for x in (q_BHTD, k_BGSD, v_BGSD)):
        return "the elements of a head must be contiguous in q, k and v"
    if min(q_BHTD.size(2), k_BGSD.size(2), q_BHTD.size(0)) == 0:
        return "there are no tokens"
    if backend == "flash_cpu":
        if dropout:
            return "it has no dropout"
        return "it returns no gradient of the mask" if mask is not None and mask.requires_grad else None
    if mask is not None:
        return "it takes no mask tensor"
    return _cuda_obstacle(backend, q_BHTD.size(-1), q_BHTD.device)


def _cuda_obstacle(backend: str, head_size: int, device: torch.device) -> str | None:
    capability, largest, multiple = _CUDA_LIMITS[backend]
    if head_size > largest or head_size % multiple:
        return f"its head size must be a multiple of {multiple} up to {largest}, this is {head_size}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]}"
    if backend == "flash_attn" and not flash_attn_installed():
        return "flash-attn is not installed (uv sync --extra flash)"
    if backend == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention"
    if backend == "cudnn" and not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    return None


@functools.cache
def flash_attn_installed() -> bool:
    """Whether the `flash-attn` package can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _announce(backend: str, is_forced: bool, device_type: str, dtype: torch.dtype, has_dropout: bool) -> None:
    # Cached, so that a training run says it once.
    _log.info("attention: %s for %s on %s (%s)", backend, dtype, device_type, "forced" if is_forced else "chosen")
    if backend == "eager" and not is_forced:
        cause = "with attention dropout" if has_dropout else f"for these {dtype} tensors"
        warnings.warn(
            f"Attention has no flash kernel {cause} on {device_type}: memory and time grow with the square of the "
            "sequence length.",
            stacklevel=3,
        )
