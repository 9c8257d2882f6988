"""Modules that are executed from their source, changed where it loads the compiler, a converter or matplotlib."""

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.lazy_imports.source import compiled, parse

# Modules that load torch's compiler when they are imported.
WITHOUT_COMPILER = (
    "lightning.fabric.wrappers",
    "lightning.pytorch.trainer.connectors.logger_connector.result",
    "lightning.pytorch.utilities.compile",
    "litgpt.generate.base",
    "litgpt.generate.speculative_decoding",
    "litgpt.generate.tp",
    "torch.utils.flop_counter",
)

# Functions that a module imports from a big one and hardly ever calls: module, name, and where it comes from.
CALLED_RARELY = {
    "litgpt.model": ("qkv_reassemble", "litgpt.scripts.convert_hf_checkpoint"),
    "litgpt.tokenizer": ("fix_and_load_json", "litgpt.utils"),
}

# Loads matplotlib when it is imported.
PLOTS = "torchmetrics.utilities.plot"


class _NotLoaded(type):
    """The metaclass of a stand-in for a class, which has no instances until that class is loaded."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls._loaded())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._loaded())

    def _loaded(cls) -> type | tuple[()]:
        return getattr(sys.modules.get(cls.__module__), cls.__name__, ())


def _stand_in(module: str, name: str) -> type:
    return _NotLoaded(name, (), {"__module__": module})


def _is_compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


# Stand-ins for objects of torch's compiler until it is loaded.
_IS_COMPILING = "_litgpt_moe_ext_is_compiling"
_STAND_INS: dict[str, tuple[str, str, Any]] = {
    "OptimizedModule": (
        "torch._dynamo.eval_frame",
        "OptimizedModule",
        _stand_in("torch._dynamo.eval_frame", "OptimizedModule"),
    ),
    "_JITFunction": ("triton.runtime.jit", "JITFunction", _stand_in("triton.runtime.jit", "JITFunction")),
    _IS_COMPILING: ("torch._dynamo.external_utils", "is_compiling", _is_compiling),
}


def execute_without_compiler(module: ModuleType, loader: Any) -> None:
    """Execute one of `WITHOUT_COMPILER`, with stand-ins for its imports from torch's compiler or Triton."""
    tree = parse(module, loader)
    if tree is None or "torch._dynamo" in sys.modules:
        loader.exec_module(module)
        return
    for name, (home, original, stand_in) in _STAND_INS.items():
        _put_until_loaded(module, name, stand_in, home, original)
    exec(compiled(module, _WithoutCompiler().visit(tree).body), module.__dict__)


def execute_without_function(module: ModuleType, loader: Any) -> None:
    """Execute one of `CALLED_RARELY`, with a function that imports the real one when called."""
    name, home = CALLED_RARELY[module.__name__]
    tree = parse(module, loader)
    if tree is None or home in sys.modules:
        loader.exec_module(module)
        return

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(home), name)(*args, **kwargs)

    _put_until_loaded(module, name, stand_in, home, name)
    body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == home)]
    exec(compiled(module, body), module.__dict__)


def _put_until_loaded(module: ModuleType, name: str, stand_in: Any, home: str, original: str) -> None:
    """Put a stand-in into a module until the module that has the original is loaded."""
    module.__dict__[name] = stand_in

    def put_back(home: ModuleType) -> None:
        if module.__dict__.get(name) is stand_in:
            module.__dict__[name] = getattr(home, original)

    autoload.when_imported(home, put_back)


def execute_without_matplotlib(module: ModuleType, loader: Any) -> None:
    """Execute `PLOTS`, so that the first plot imports matplotlib."""
    tree = parse(module, loader)
    body = [] if tree is None else tree.body
    choices = [i for i, node in enumerate(body) if isinstance(node, ast.If) and _is(node.test, "_MATPLOTLIB_AVAILABLE")]
    if len(choices) != 1 or "matplotlib" in sys.modules:
        loader.exec_module(module)
        return
    index = choices[0]
    choice = cast("ast.If", body[index])
    imports = compiled(module, choice.body)

    # All functions that plot are decorated with it.
    @contextlib.contextmanager
    def style_change(*args: Any, **kwargs: Any) -> Iterator[None]:
        exec(imports, module.__dict__)
        with module.style_change(*args, **kwargs):
            yield

    exec(compiled(module, [*body[:index], *choice.orelse]), module.__dict__)
    module.__dict__["style_change"] = style_change
    exec(compiled(module, body[index + 1 :]), module.__dict__)


class _WithoutCompiler(ast.NodeTransformer):
    """Replaces expressions that load torch's compiler by equivalents that do not."""

    def visit_Import(self, node: ast.Import) -> ast.Import | None:
        # torch imports both itself when the attribute is accessed.
        node.names = [
            alias for alias in node.names if alias.name not in ("torch._dynamo.config", "torch._inductor.config")
        ]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        names = [(node.module, alias.name, alias.asname) for alias in node.names]
        stand_in = names in (
            [("torch._dynamo", "OptimizedModule", None)],
            [("triton.runtime.jit", "JITFunction", "_JITFunction")],
        )
        return ast.copy_location(ast.Pass(), node) if stand_in else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        # torch's own version of the decorator, which loads the compiler only when the function is called.
        node.decorator_list = [
            _expression("torch._disable_dynamo", decorator) if _is(decorator, "torch.compiler.disable") else decorator
            for decorator in node.decorator_list
        ]
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "is_compiling" and _is(node, "torch._dynamo.is_compiling"):
            return _expression(_IS_COMPILING, node)
        return self.generic_visit(node)


def _is(node: ast.expr, text: str) -> bool:
    return ast.unparse(node) == text


def _expression(text: str, place: ast.expr) -> ast.expr:
    expression = ast.parse(text, mode="eval").body
    for node in ast.walk(expression):
        ast.copy_location(node, place)
    return expression
