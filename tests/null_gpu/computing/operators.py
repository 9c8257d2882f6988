"""PyTorch's operators on the null GPU: its own kernel reserves memory, waits and refuses; the CPU's computes."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.null_gpu.computing import capture
from tests.null_gpu.computing.fused import FUSED
from tests.null_gpu.computing.memory import each, flat, on_cpu

aten = torch.ops.aten
# They start other operators, which are computed themselves; or they have nothing to compute.
_LEFT = {"_fused_sdp_choice", "empty", "empty_strided", "is_pinned", "is_set_to", "record_stream", "resize_", "set_"}
# Beside those that have a kernel of their own for GPUs.
_ALSO = ("aten::copy_",)
_MASKS = (torch.bool, torch.uint8)
_NUMBERS = ("Scalar", "number", "bool", "int", "float")
# Whether this thread is in a kernel, which may start other operators: what they come to is computed with it.
_inside = threading.local()
# Held, because the kernels go when it does.
_library: torch.library.Library | None = None


def install() -> None:
    """Replace the kernels of all operators."""
    global _library
    torch.cuda.init()
    _library = torch.library.Library("aten", "IMPL")
    for name in [*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), *_ALSO]:
        namespace, _, short = name.partition("::")
        base, _, overload = short.partition(".")
        operator = getattr(getattr(aten, base, None), overload or "default", None)
        if namespace != "aten" or operator is None or _is_left(base, operator):
            continue
        kernel = torch.library.get_kernel(name, "CUDA")
        how = _sized_by_values if _is_sized_by_values(operator) else _number if _is_number(operator) else _computed
        function = _without_context(how(operator, kernel))
        _library.impl(short, function, "CUDA", with_keyset=True, allow_override=True)


def _is_left(base: str, operator: Any) -> bool:
    aliases = [result.alias_info for result in operator._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or base in _LEFT or base.startswith("_scaled_dot_product")


def _is_sized_by_values(operator: Any) -> bool:
    return torch.Tag.dynamic_output_shape in operator.tags


def _is_number(operator: Any) -> bool:
    results = [str(result.type) for result in operator._schema.returns]
    return bool(results) and set(results) <= set(_NUMBERS)


def _without_context(function: Callable) -> Callable:
    """Let `with torch.device(...)` around an operator not change what is computed within."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return inner


def _number(operator: Any, kernel: Any) -> Callable:
    """The kernel waits, or refuses to; the number comes from the CPU."""

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        args = _numbers_as_tensors(operator, args)
        _call(kernel, keys, args, kwargs)
        return _by_the_cpu(operator, args, kwargs)

    return run


def _sized_by_values(operator: Any, kernel: Any) -> Callable:
    """The kernel would wait for a size that was not computed, and reserve so much memory: here it only waits."""
    computed = _computed(operator, kernel)

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        # Its tag is for masks; rows that numbers name are as many as these.
        if operator is aten.index.Tensor and not any(i is not None and i.dtype in _MASKS for i in args[1]):
            return computed(keys, *args, **kwargs)
        args = _numbers_as_tensors(operator, args)
        device = torch.device("cuda", _device_of(args))
        torch.cuda.current_stream(device).synchronize()
        results = _by_the_cpu(operator, args, kwargs)
        return each(lambda result: result.to(device) if isinstance(result, Tensor) else result, results)

    return run


def _by_the_cpu(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return operator(*each(_given, list(args)), **{name: each(_given, value) for name, value in kwargs.items()})


def _computed(operator: Any, kernel: Any) -> Callable:
    name = operator._schema.name.removeprefix("aten::")
    compute = FUSED.get(name, operator)
    if operator._overloadname == "dtype" and operator._schema.arguments[-1].name == "out_dtype":
        compute = _in_another_dtype(operator.overloadpacket.default)

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        seed = _Seed([*args, *kwargs.values()]) if torch.Tag.nondeterministic_seeded in operator.tags else None
        args = _numbers_as_tensors(operator, args)
        if name == "pow" and not isinstance(args[0], Tensor):
            results = _like(operator, args)
        else:
            results = _call(kernel, keys, args, kwargs)
        if getattr(_inside, "kernel", False):
            return results
        if seed is not None:
            seed.drawn((name, *(value.shape for value in flat(args) if isinstance(value, Tensor))))
        given = each(_given, list(args)), {key: each(_given, value) for key, value in kwargs.items()}
        given[1].pop("pin_memory", None)
        places = [on_cpu(r) if isinstance(r, Tensor) and r.is_cuda else None for r in flat(results)]

        def computation() -> None:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed.value())
                found = flat(compute(*given[0], **given[1]))
            # Fused kernels have further results, which nobody reads but their own backward pass.
            for place, value in zip(places, found, strict=name not in FUSED):
                if place is not None and isinstance(value, Tensor) and not _same(place, value):
                    assert place.shape == value.shape, (name, place.shape, value.shape)
                    place.copy_(value)

        capture.compute(computation)
        return results

    return run


def _in_another_dtype(product: Callable) -> Callable:
    """Return what computes a product of 16-bit matrices in float32, for which the CPU has no kernel."""

    def compute(*args: Any, **kwargs: Any) -> Tensor:
        *matrices, dtype = args
        return product(*(matrix.to(dtype) for matrix in matrices), **kwargs)

    return compute


def _call(kernel: Any, keys: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    before, _inside.kernel = getattr(_inside, "kernel", False), True
    try:
        return kernel.call_boxed(keys, *args, **kwargs)
    finally:
        _inside.kernel = before


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _given(value: Any) -> Any:
    """Return an argument for the CPU's kernel."""
    if isinstance(value, Tensor):
        return on_cpu(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    # Random numbers come from the seed instead.
    return None if isinstance(value, torch.Generator) else value


class _Seed:
    """What the random numbers of a call depend on: its generator's seed, and how many it has drawn before.

    Args:
        arguments: Those of the call; the default generator is taken if there is none among them.
    """

    # How many numbers calls draw, which a generator does not say while a graph is captured.
    _counts: ClassVar[dict[Any, int]] = {}

    def __init__(self, arguments: Sequence[Any]) -> None:
        generators = [value for value in arguments if isinstance(value, torch.Generator)]
        self._generator = (generators or [torch.cuda.default_generators[_device_of(arguments)]])[0]
        self._before = 0 if capture.is_capturing() else self._generator.get_offset()
        self._drawn_before: Callable[[], int] = lambda: self._before
        self._seed = self._generator.initial_seed()

    def drawn(self, call: Any) -> None:
        """Take note of what the call has drawn."""
        if capture.is_capturing():
            self._drawn_before = capture.draw(self._counts[call])
        else:
            self._counts[call] = self._generator.get_offset() - self._before

    def value(self) -> int:
        """Return the seed for the CPU."""
        return (self._seed * 1_000_003 + self._drawn_before()) % 2**63


def _device_of(arguments: Sequence[Any]) -> int:
    """Return the number of the GPU that a call with these arguments is about."""
    places = [value.device if isinstance(value, Tensor) else value for value in flat(list(arguments))]
    numbers = [place.index for place in places if isinstance(place, torch.device) and place.type == "cuda"]
    return next((number for number in numbers if number is not None), torch.cuda.current_device())


def _numbers_as_tensors(operator: Any, args: Sequence[Any]) -> list[Any]:
    """Return the arguments with tensors that promote no others in the place of numbers.

    Python sees a number where C++ has a tensor that is marked as one.
    """
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    first = next((value for value in args if isinstance(value, Tensor)), None)

    def convert(value: Any, kind: str) -> Any:
        if kind not in ("Tensor", "Optional[Tensor]") or not isinstance(value, int | float | complex):
            return value
        own = torch.tensor(value)
        if first is None or first.dtype == torch.bool or (own.is_floating_point() and not first.is_floating_point()):
            return own
        return own.to(first.dtype)

    return [convert(value, kind) for value, kind in zip(args, kinds, strict=False)]


def _like(operator: Any, args: Sequence[Any]) -> Tensor:
    """Return memory for the result, where the kernel hands a number on the GPU to another: Python cannot take it."""
    result = operator(*(value.to("meta") if isinstance(value, Tensor) else value for value in args))
    device = torch.device("cuda", _device_of(args))
    return torch.empty_strided(result.size(), result.stride(), dtype=result.dtype, device=device)
