"""`torch.compile` only where it works and pays off.

LitGPT 0.5.13 compiles every model it pretrains. Without a compiler (Windows without MSVC or Triton, a slim container
without a C++ compiler) the first training step fails. On a CPU, compilation takes minutes and measurably gains nothing,
and an expert loop with data-dependent row counts breaks the graph in every layer. Here the choice is made before the
first step and printed in one line; if the compiler fails, the model runs eagerly.
"""

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from litgpt_moe_ext.config.features import MLP_CLASS_NAMES
from litgpt_moe_ext.host.autoload import when_imported
from litgpt_moe_ext.host.replaced import replaced
from litgpt_moe_ext.host.without_compiler import without_compiler

if TYPE_CHECKING:
    from litgpt.config import Config


def obstacle(device_type: str) -> str | None:
    """Return what keeps `torch.compile` from working on this machine, or None.

    Args:
        device_type: Where the model will run: cpu, cuda, mps.
    """
    windows = platform.system() == "Windows"
    if device_type == "cuda":
        import torch

        from litgpt_moe_ext.kernels.launch import triton_obstacle

        if find_spec("triton") is None:
            return f"Triton is not installed (pip install {'triton-windows' if windows else 'triton'})"
        capability = torch.cuda.get_device_capability()
        if capability < (7, 0):
            return f"Triton needs compute capability 7.0, this GPU has {'.'.join(map(str, capability))}"
        return triton_obstacle()
    compilers = [os.environ.get("CXX"), *(["cl"] if windows else ["g++", "clang++", "c++"])]
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        compiler = "MSVC's cl.exe" if windows else "a C++ compiler"
        return f"{compiler} was not found on the path"
    return None


@dataclass(frozen=True)
class CompileDecision:
    """Whether a model will be compiled, and why or why not.

    Attributes:
        enabled: Whether it will be compiled.
        reason: The reason, worded to follow "on" or "off".
    """

    enabled: bool
    reason: str

    def __str__(self) -> str:
        return f"torch.compile: {'on' if self.enabled else 'off'} ({self.reason})"


def decide(requested: bool | Literal["auto"], config: "Config", device_type: str) -> CompileDecision:
    """Choose between compiled and eager execution.

    Args:
        requested: True and False are obeyed if possible; `"auto"` chooses.
        config: The model's configuration.
        device_type: Where the model will run: cpu, cuda, mps.

    Returns:
        The choice with its reason.
    """
    if requested is False:
        return CompileDecision(False, "as asked")
    hindrance = obstacle(device_type)
    if hindrance is not None:
        return CompileDecision(False, hindrance)
    if requested is True:
        return CompileDecision(True, "as asked")
    if device_type != "cuda":
        return CompileDecision(False, f"it gains little on {device_type}; --compile true tries it")
    if config.mlp_class_name == "LLaMAMoE":
        return CompileDecision(False, "its loop over experts breaks the graph in every layer; --compile true tries it")
    if config.mlp_class_name in MLP_CLASS_NAMES:
        return CompileDecision(False, "it gained an MoE model nothing on an H200; --compile true tries it")
    return CompileDecision(True, "a dense model on a GPU with Triton")


_in_scope = False


def decided() -> bool:
    """Return whether a `compile_scope` is active, which decides what is compiled."""
    return _in_scope


@contextlib.contextmanager
def compile_scope(decision: CompileDecision) -> Iterator[None]:
    """Carry out a decision for every `torch.compile` in the scope, LitGPT's own included."""
    global _in_scope
    import torch

    _in_scope = True
    try:
        if decision.enabled:
            import torch._dynamo

            # A compiler that fails in the first step costs a warning, not the run.
            with torch._dynamo.config.patch(suppress_errors=True), _loop_left_alone():
                yield
        else:
            with _uncompiled():
                yield
    finally:
        _in_scope = False


@contextlib.contextmanager
def _loop_left_alone() -> Iterator[None]:
    # The loop over experts differs with every batch: the compiler would make it anew for other experts without rows, or
    # with a single one, until it gives up. A mark where the function is defined would load the compiler in every run.
    import torch

    from litgpt_moe_ext.moe.kernels import loop

    with replaced(loop, {"one_by_one": torch.compiler.disable(loop.one_by_one)}):
        yield


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    # Even when told to compile nothing, `torch.compile` and torch's exclusions from compilation load the compiler,
    # which takes 4 s of processor time.
    import torch

    original, ended = torch.compile, False
    with without_compiler(), contextlib.ExitStack() as stack:

        def force_eager(_module: object) -> None:
            # After the scope has ended, nothing would reset the stance.
            if not ended:
                stack.enter_context(torch.compiler.set_stance("force_eager"))

        torch.compile = _leave_alone
        try:
            # Other code may load the compiler, or has loaded it and compiled something.
            when_imported("torch._dynamo", force_eager)
            yield
        finally:
            torch.compile, ended = original, True


def _leave_alone(model: Any = None, **_options: Any) -> Any:
    """Return the model given to `torch.compile` as it is; without a model, return a decorator that does so."""
    return _leave_alone if model is None else model
