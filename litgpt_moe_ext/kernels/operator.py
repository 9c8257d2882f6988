"""Operators of torch whose arguments are named tuples, with their gradients and the FLOPs they cost."""

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
# What is to be registered with torch's FLOP counter, by operator.
_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {}


def define(
    name: str, arguments: Mapping[str, Any], n_result: int, function: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Define an operator for CPUs and GPUs, without a gradient, and return its overload.

    Args:
        name: Name of the operator.
        arguments: Type of each argument.
        n_result: Number of tensors returned.
        function: What computes them.
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

    Where something watches operators (a compiler, the FLOP counter, fake tensors, selective checkpointing) it is the
    operator that runs; elsewhere the function behind it, because torch takes longer to get from a Python operator to
    its function, and back through its gradient, than the GPU takes for a small layer.

    Args:
        name: Name of the operator.
        kind: Class of the named tuple.
        function: Takes the named tuple.
        fake: Takes it too; returns empty results of the right shape.
        n_result: Number of tensors returned.
        flops: Takes it with shapes in the place of tensors; returns what a call costs. None for nothing.
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

        # Torch would warn, and take its result for a constant.
        self._differentiated = self._with_gradient(lambda *_: None, refuse)
        if flops is not None:
            _FLOP_FORMULAS[self._overload.overloadpacket] = lambda *shapes, **_: flops(kind(*shapes))
            if (flop_counter := sys.modules.get("torch.utils.flop_counter")) is not None:
                register_flops(flop_counter)

    def __call__(self, call: Any) -> Any:
        """Return what the function returns, a tensor or a tuple of tensors."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or call[0].is_meta:
            return self._overload(*call)
        if not torch.is_grad_enabled():
            return self._function(call)
        return self._differentiated.apply(*call)

    def set_gradient(self, backward: Callable[..., Mapping[str, Tensor | None]], unread: Collection[str] = ()) -> None:
        """Make it differentiable.

        Args:
            backward: Takes the named tuple, one of the same class that says which arguments need a gradient, and
                gradients of the results; returns those of the arguments by name.
            unread: Arguments that it does not read, which are not kept and None to it.
        """
        kind = self._kind
        tensors = [name for name, type_ in kind.__annotations__.items() if type_ in (Tensor, Tensor | None)]
        kept = [i for i, name in enumerate(kind._fields) if name in tensors and name not in unread]
        others = [i for i, name in enumerate(kind._fields) if name not in tensors]
        # Where each argument is among those that are kept, the others, and at the end None.
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
            # A function with a context of its own (`setup_context`) has its signature inspected at every call.
            output = self._function(self._kind(*args))
            keep(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self._name, (torch.autograd.Function,), methods)


def operator(name: str, kind: type, fake: Callable[[Any], Any], **options: Any) -> Callable[[Callable], Operator]:
    """Return a decorator that makes an `Operator` of a function; the arguments are those of the class."""
    return lambda function: Operator(name, kind, function, fake, **options)


def register_flops(flop_counter: Any) -> None:
    """Tell torch's FLOP counter what the operators cost that have been defined so far.

    Args:
        flop_counter: The module `torch.utils.flop_counter`. It imports Triton, so it is not imported for this.
    """
    for packet, formula in _FLOP_FORMULAS.items():
        if packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(formula)
