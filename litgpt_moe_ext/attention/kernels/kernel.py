"""What an attention kernel is, as plain data. Imports no torch, so that reading a configuration stays cheap."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

# CUDA compute capability, for example (8, 6); (0, 0) for everything else.
Capability: TypeAlias = tuple[int, int]
Ability: TypeAlias = Literal["mask", "mask_gradient", "window", "documents", "dropout", "gradient"]
EVERY_ABILITY: frozenset[Ability] = frozenset(get_args(Ability))
DTYPES = ("float64", "float32", "float16", "bfloat16")


class KernelFunctions(Protocol):
    """The two functions of a kernel; a module that defines them will do.

    Attributes:
        forward: `(Inputs, Call) -> Result`, see `calls.py`: the output, the log-sum-exp of the scaled scores, and
            whatever else the backward needs.
        backward: `(dout_BHTd, Inputs, Result, Call) -> (dq_BHTd, dk_BGSd, dv_BGSd)`. It must recompute probabilities as
            `exp(score - lse)` and `rowsum(dout * out)` from the given `lse` and output, because sinks change both.
            Never called if the kernel's abilities lack "gradient".
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Workload(NamedTuple):
    """The properties of a computation on which the choice between kernels depends.

    Attributes:
        device: Type of the device, "cpu", "cuda" (NVIDIA's GPUs) or "hip" (AMD's).
        capability: Its CUDA compute capability; (0, 0) if it is not NVIDIA's.
        dtype: Name of the type of q, k and v, such as "bfloat16".
        head_size: Elements of a head, d.
        needs: Abilities needed besides causal attention.
    """

    device: str
    capability: Capability
    dtype: str
    head_size: int
    needs: tuple[Ability, ...] = ()


class HeadSizes(NamedTuple):
    """Head sizes of a kernel: multiples of a number, up to a maximum."""

    multiple_of: int = 1
    largest: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """What an attention kernel can do.

    Attributes:
        name: Its name in `attention_backend`.
        summary: A description, for tables.
        functions: The kernel's functions, or the name of a module that defines them, imported on first use. None for
            the written-out softmax, which `sinks.py` computes without them.
        device: Type of the device that it works on; None for every device.
        dtypes: Lowest compute capability by name of the floating point type.
        head_sizes: Supported head sizes.
        abilities: What it computes besides plain causal attention. A "mask" is an additive mask tensor that needs no
            gradient; "window" and "documents" are computed within the kernel (without them, attention is cut into
            pieces that the kernel computes one by one).
        preferred_on: Majors of the compute capability on which it precedes all other kernels for attention without
            mask, window, documents and dropout.
        automatic: Whether it may be chosen without being named by `attention_backend`.
        switch: Name of torch's switch for it, which `F.scaled_dot_product_attention` heeds but direct calls of the
            operators do not: it is off after `torch.backends.cuda.enable_{switch}_sdp(False)`, on CPUs too.
        missing: Returns what the machine or the installation lacks for it, or None.
        refuses: Returns why it cannot compute a workload that the fields above allow, or None.
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
