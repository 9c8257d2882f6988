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
    """A torch operator whose arguments are the fields of a named tuple.

    Called with these fields. Where something watches operators (a compiler, the FLOP counter, fake tensors, selective
    checkpointing) it is the operator that runs; elsewhere the function behind it, because torch takes longer to get
    from a Python operator to its function, and back through its gradient, than the GPU takes for a small layer.

    Args:
        name: Name of the operator.
        call: Class of the named tuple.
        function: Takes the named tuple.
        fake: Takes it too; returns empty results of the right shape.
        n_result: Number of tensors returned.
        flops: Takes it with shapes in the place of tensors; returns what a call costs. None for nothing.
    """

    def __init__(
        self,
        name: str,
        call: Any,
        function: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        n_result: int = 1,
        flops: Callable[[Any], int] | None = None,
    ) -> None:
        self._name, self._fields = name, call._fields
        self._tensors = {field for field, kind in call.__annotations__.items() if kind in (Tensor, Tensor | None)}
        self._function = lambda *args: function(call(*args))
        self._overload = define(name, call.__annotations__, n_result, self._function, lambda *args: fake(call(*args)))

        def refuse(_ctx: Any, *_gradients: Tensor) -> None:
            raise RuntimeError(f"{_NAMESPACE}::{name} has no gradient, so what uses it cannot be differentiated twice")

        # Torch would warn, and take its result for a constant.
        self._differentiated = self._with_gradient(lambda *_: None, refuse)
        if flops is not None:
            _FLOP_FORMULAS[self._overload.overloadpacket] = lambda *shapes, **_: flops(call(*shapes))
            if (flop_counter := sys.modules.get("torch.utils.flop_counter")) is not None:
                register_flops(flop_counter)

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns, as a tensor or a tuple of tensors."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or args[0].is_meta:
            return self._overload(*args)
        if not torch.is_grad_enabled():
            return self._function(*args)
        return self._differentiated.apply(*args)

    def set_gradient(self, backward: Callable[..., Any], unread: Collection[str] = ()) -> None:
        """Make it differentiable.

        Args:
            backward: Takes the context of an autograd function, whose arguments are `arguments_of(context)`, and
                gradients of the results; returns those of the arguments.
            unread: Arguments that it does not read, which are not kept and None to it.
        """
        tensors = tuple(i for i, name in enumerate(self._fields) if name in self._tensors and name not in unread)
        others = tuple(i for i, name in enumerate(self._fields) if name not in self._tensors)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            del output
            ctx.save_for_backward(*[inputs[i] for i in tensors])
            ctx.others = [inputs[i] for i in others]
            ctx.places = len(inputs), tensors, others

        torch.library.register_autograd(f"{_NAMESPACE}::{self._name}", backward, setup_context=keep)
        self._differentiated = self._with_gradient(keep, backward)

    def _with_gradient(self, keep: Callable[..., None], backward: Callable[..., Any]) -> Any:
        def forward(ctx: Any, *args: Any) -> Any:
            # A function with a context of its own (`setup_context`) has its signature inspected at every call.
            output = self._function(*args)
            keep(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self._name, (torch.autograd.Function,), methods)


def operator(name: str, call: type, fake: Callable[[Any], Any], **options: Any) -> Callable[[Callable], Operator]:
    """Return a decorator that makes an `Operator` of a function; the arguments are those of the class."""
    return lambda function: Operator(name, call, function, fake, **options)


def arguments_of(ctx: Any) -> list[Any]:
    """Return the arguments of the operator whose backward pass runs in this context."""
    n, tensors, others = ctx.places
    arguments: list[Any] = [None] * n
    for i, value in zip(tensors, ctx.saved_tensors, strict=True):
        arguments[i] = value
    for i, value in zip(others, ctx.others, strict=True):
        arguments[i] = value
    return arguments


def register_flops(flop_counter: Any) -> None:
    """Tell torch's FLOP counter what the operators cost that have been defined so far.

    Args:
        flop_counter: The module `torch.utils.flop_counter`. It imports Triton, so it is not imported for this.
    """
    for packet, formula in _FLOP_FORMULAS.items():
        if packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(formula)
