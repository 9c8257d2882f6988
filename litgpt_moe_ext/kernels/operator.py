"""Torch operators whose arguments are named tuples, with their gradients and FLOPs."""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_NAMESPACE = "litgpt_moe_ext"
_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool", float: "float", str: "str",
    torch.dtype: "ScalarType",
}  # fmt: skip
# Formulas to register with torch's FLOP counter, by operator.
_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {}


def define(
    name: str, arguments: Mapping[str, Any], n_result: int, function: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Define an operator for CPUs and GPUs, without a gradient, and return its overload.

    Args:
        name: Name of the operator.
        arguments: Type of each argument.
        n_result: Number of tensors returned.
        function: Computes the results.
        fake: Returns empty results of the right shape.
    """
    schema = ", ".join(f"{_SCHEMA_TYPES[kind]} {argument}" for argument, kind in arguments.items())
    results = "Tensor" if n_result == 1 else "(" + ", ".join(["Tensor"] * n_result) + ")"
    full_name = f"{_NAMESPACE}::{name}"
    torch.library.define(full_name, f"({schema}) -> {results}")
    torch.library.impl(full_name, ("cpu", "cuda"), function)
    torch.library.register_fake(full_name, fake)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


class Operator:
    """A torch operator that is called with a named tuple, whose fields are its arguments.

    The operator itself runs only where something intercepts operators (a compiler, the FLOP counter, fake tensors,
    selective checkpointing). Elsewhere its function is called directly, because torch's dispatch of a Python operator
    and its gradient takes longer than the GPU takes for a small layer.

    Args:
        name: Name of the operator.
        kind: Class of the named tuple.
        function: Computes the results from the named tuple.
        fake: Returns empty results of the right shape for the named tuple.
        n_result: Number of tensors returned.
        flops: Returns the FLOPs of a call from the named tuple with shapes instead of tensors. None for no FLOPs.
    """

    def __init__(
        self,
        name: str,
        kind: Any,
        function: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        n_result: int = 1,
        flops: Callable[[Any], int] | None = None,
    ) -> None:
        self._name, self._kind, self._function = name, kind, function
        self._overload = define(
            name, kind.__annotations__, n_result, lambda *args: function(kind(*args)), lambda *args: fake(kind(*args))
        )

        def refuse(_ctx: Any, *_gradients: Tensor) -> None:
            raise RuntimeError(f"{_NAMESPACE}::{name} has no gradient, so what uses it cannot be differentiated twice")

        # Without a gradient torch would warn, and treat the result as a constant.
        self._differentiated = self._with_gradient(lambda *_: None, refuse)
        if flops is not None:
            _FLOP_FORMULAS[self._overload.overloadpacket] = lambda *shapes, **_: flops(kind(*shapes))
            if (flop_counter := sys.modules.get("torch.utils.flop_counter")) is not None:
                register_flops(flop_counter)

    def __call__(self, call: Any) -> Any:
        """Return the results of the function, a tensor or a tuple of tensors."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or call[0].is_meta:
            return self._overload(*call)
        if not torch.is_grad_enabled():
            return self._function(call)
        return self._differentiated.apply(*call)

    def set_gradient(self, backward: Callable[..., Mapping[str, Tensor | None]], unread: Collection[str] = ()) -> None:
        """Make it differentiable.

        Args:
            backward: Takes the named tuple, one of the same class that says which arguments need a gradient, and the
                gradients of the results; returns the gradients of the arguments by name.
            unread: Arguments that `backward` does not read; they are not kept, and None there.
        """
        kind = self._kind
        tensors = [name for name, type_ in kind.__annotations__.items() if type_ in (Tensor, Tensor | None)]
        kept = [i for i, name in enumerate(kind._fields) if name in tensors and name not in unread]
        others = [i for i, name in enumerate(kind._fields) if name not in tensors]
        # The index of each argument among the kept tensors, then the others, then None.
        order = [(*kept, *others).index(i) if i in (*kept, *others) else -1 for i in range(len(kind._fields))]

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            del output
            ctx.save_for_backward(*[inputs[i] for i in kept])
            ctx.others = [inputs[i] for i in others]

        def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            values = (*ctx.saved_tensors, *ctx.others, None)
            found = backward(kind(*[values[i] for i in order]), kind(*ctx.needs_input_grad), *gradients)
            return tuple([found.get(name) for name in kind._fields])

        torch.library.register_autograd(f"{_NAMESPACE}::{self._name}", differentiate, setup_context=keep)
        self._differentiated = self._with_gradient(keep, differentiate)

    def _with_gradient(self, keep: Callable[..., None], backward: Callable[..., Any]) -> Any:
        def forward(ctx: Any, *args: Any) -> Any:
            # With a separate `setup_context`, torch would inspect the signature at every call.
            output = self._function(self._kind(*args))
            keep(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self._name, (torch.autograd.Function,), methods)


def operator(name: str, kind: type, fake: Callable[[Any], Any], **options: Any) -> Callable[[Callable], Operator]:
    """Return a decorator that turns a function into an `Operator`; takes the arguments of the class."""
    return lambda function: Operator(name, kind, function, fake, **options)


def register_flops(flop_counter: Any) -> None:
    """Register the FLOP formulas of the operators defined so far with torch's FLOP counter.

    Args:
        flop_counter: The module `torch.utils.flop_counter`; a parameter, because importing it would import Triton.
    """
    for packet, formula in _FLOP_FORMULAS.items():
        if packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(formula)
