"""Postpone what LitGPT's imports load and never use.

`import litgpt.pretrain` imports all of torchmetrics, because lightning asks for its version and two base classes and
LitGPT for one running mean. torchmetrics imports torchvision, transformers' model classes, scikit-learn, pandas and
scipy.signal, and matplotlib for methods that plot. Lightning and LitGPT also import torch's compiler, to ask whether an
object was compiled, to keep two methods from being compiled and to set options that only `--compile` needs. Together
that is two thirds of the time to start. torch's FLOP counter imports Triton, to recognise its functions.

`import litgpt` itself loads lightning and all that LitGPT can do, of which whoever only describes a model needs two
modules.

Nothing here pretends to be a module. The `__init__` of torchmetrics and of litgpt run, statement by statement, in their
own module objects: what loads something big waits until somebody asks for a name or a submodule beyond a few, and then
runs in its original order. Nine modules of lightning, LitGPT, torch and torchmetrics are executed from their own source
with the few expressions changed that load the compiler, matplotlib, or a converter: a class that `isinstance` asks
about, and a function that tells whether code is being compiled, have stand-ins that are right as long as the compiler
is not loaded and give way once it is.

A process gets this when it imports LitGPT, or the parts of this package that do, and only for modules that are not
loaded by then. Python 3.15 has lazy imports of its own (PEP 810), which will replace this.
"""

import ast
import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any, cast

from litgpt_moe_ext.host import autoload


@dataclass(frozen=True)
class Package:
    """What can be had of a package before its `__init__` has run to the end.

    Attributes:
        names: Attributes that are imported from the submodules the `__init__` takes them from.
        submodules: Submodules that can be imported, with their own submodules.
        first: The submodule that is imported before all others, which rely on it.
    """

    names: frozenset[str]
    submodules: tuple[str, ...]
    first: str


PACKAGES = {
    "torchmetrics": Package(
        names=frozenset({"Metric", "MetricCollection", "RunningMean"}),
        submodules=("utilities", "metric", "collections", "aggregation", "wrappers"),
        first="utilities",
    ),
    # What describes a model needs neither lightning nor what LitGPT trains and chats with.
    "litgpt": Package(names=frozenset({"Config", "GPT"}), submodules=("config", "constants", "model"), first="model"),
}

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

# Functions that a module takes from a big one and hardly ever calls: module, name, and where it comes from.
CALLED_RARELY = {"litgpt.model": ("qkv_reassemble", "litgpt.scripts.convert_hf_checkpoint")}


# Loads matplotlib when it is imported.
PLOTS = "torchmetrics.utilities.plot"


class _NotLoaded(type):
    """The class of a class that stands for another, and has no instances until that is loaded."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls._loaded())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._loaded())

    def _loaded(cls) -> type | tuple[()]:
        return getattr(sys.modules.get(cls.__module__), cls.__name__, ())


def _stand_in(module: str, name: str) -> type:
    return _NotLoaded(name, (), {"__module__": module})


def install() -> None:
    """Postpone imports in this process from now on; modules that are loaded already stay as they are."""
    for name in PACKAGES:
        autoload.execute_with(name, _execute_split)
    for name in WITHOUT_COMPILER:
        autoload.execute_with(name, _execute_without_compiler)
    for name in CALLED_RARELY:
        autoload.execute_with(name, _execute_without_function)
    autoload.execute_with(PLOTS, _execute_without_matplotlib)


def _execute_split(module: ModuleType, loader: Any) -> None:
    tree = _parse(module, loader)
    if tree is None:
        loader.exec_module(module)
        return
    split = _Split(module, tree, PACKAGES[module.__name__])
    exec(split.now, module.__dict__)
    autoload.before_submodules(module.__name__, split.before_submodule)


def _execute_without_compiler(module: ModuleType, loader: Any) -> None:
    tree = _parse(module, loader)
    if tree is None or "torch._dynamo" in sys.modules:
        loader.exec_module(module)
        return
    module.__dict__.update({name: stand_in for name, (_, _, stand_in) in _STAND_INS.items()})
    exec(_compiled(module, _WithoutCompiler().visit(tree).body), module.__dict__)
    for name, (home, original_name, stand_in) in _STAND_INS.items():

        def put_back(home: ModuleType, name: str = name, original: str = original_name, old: Any = stand_in) -> None:
            if module.__dict__.get(name) is old:
                module.__dict__[name] = getattr(home, original)

        autoload.when_imported(home, put_back)


def _execute_without_function(module: ModuleType, loader: Any) -> None:
    name, home = CALLED_RARELY[module.__name__]
    tree = _parse(module, loader)
    if tree is None or home in sys.modules:
        loader.exec_module(module)
        return

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(home), name)(*args, **kwargs)

    def put_back(home: ModuleType) -> None:
        if module.__dict__.get(name) is stand_in:
            module.__dict__[name] = getattr(home, name)

    module.__dict__[name] = stand_in
    body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == home)]
    exec(_compiled(module, body), module.__dict__)
    autoload.when_imported(home, put_back)


def _execute_without_matplotlib(module: ModuleType, loader: Any) -> None:
    tree = _parse(module, loader)
    body = [] if tree is None else tree.body
    choices = [i for i, node in enumerate(body) if isinstance(node, ast.If) and _is(node.test, "_MATPLOTLIB_AVAILABLE")]
    if len(choices) != 1 or "matplotlib" in sys.modules:
        loader.exec_module(module)
        return
    index = choices[0]
    choice = cast("ast.If", body[index])
    imports = _compiled(module, choice.body)

    # All functions that plot are decorated with it.
    @contextlib.contextmanager
    def style_change(*args: Any, **kwargs: Any) -> Iterator[None]:
        exec(imports, module.__dict__)
        with module.style_change(*args, **kwargs):
            yield

    exec(_compiled(module, [*body[:index], *choice.orelse]), module.__dict__)
    module.__dict__["style_change"] = style_change
    exec(_compiled(module, body[index + 1 :]), module.__dict__)


def _is_compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


# What stands under which name in a module for what of torch's compiler, until that is loaded.
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


class _WithoutCompiler(ast.NodeTransformer):
    """Puts what does the same without torch's compiler in the place of what loads it."""

    def visit_Import(self, node: ast.Import) -> ast.Import | None:  # noqa: N802
        # torch imports both by itself when somebody asks for the attribute.
        node.names = [
            alias for alias in node.names if alias.name not in ("torch._dynamo.config", "torch._inductor.config")
        ]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:  # noqa: N802
        names = [(node.module, alias.name, alias.asname) for alias in node.names]
        stand_in = names in (
            [("torch._dynamo", "OptimizedModule", None)],
            [("triton.runtime.jit", "JITFunction", "_JITFunction")],
        )
        return ast.copy_location(ast.Pass(), node) if stand_in else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802
        # torch's own twin of the decorator, which loads the compiler when the function is called.
        node.decorator_list = [
            _expression("torch._disable_dynamo", decorator) if _is(decorator, "torch.compiler.disable") else decorator
            for decorator in node.decorator_list
        ]
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: N802
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


def _parse(module: ModuleType, loader: Any) -> ast.Module | None:
    """Return the syntax tree of a module, or None where there is no source."""
    source = loader.get_source(module.__name__) if hasattr(loader, "get_source") else None
    return None if source is None else ast.parse(source)


def _compiled(module: ModuleType, body: list[ast.stmt]) -> CodeType:
    return compile(ast.Module(body, type_ignores=[]), module.__file__ or "<unknown>", "exec", dont_inherit=True)


class _Split:
    """The `__init__` of a package in two parts: what loads nothing new, and the rest."""

    def __init__(self, module: ModuleType, tree: ast.Module, package: Package) -> None:
        self._module, self._package = module, package
        later = _postponed(tree.body, module.__name__)
        self.now = _compiled(module, [node for node in tree.body if node not in later])
        self._later = _compiled(module, later)
        self._homes = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in later
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        self._lock = threading.RLock()
        self._completed_by: int | None = None
        module.__dict__.update(__getattr__=self._getattr, __dir__=self._dir)

    def before_submodule(self, submodule: str) -> None:
        """Run what the import of `submodule` may rely on."""
        # Another thread that completes the package may wait for this submodule, so this must not wait for it.
        if self._completed_by is not None:
            return
        top = submodule.partition(".")[0]
        if top not in self._package.submodules:
            self._complete()
        elif top != self._package.first:
            self._import(self._package.first)

    def _getattr(self, name: str) -> Any:
        if self._completed_by is None and name in self._package.names and name in self._homes:
            home, original_name = self._homes[name]
            self._import(self._package.first)
            value = self._module.__dict__[name] = getattr(importlib.import_module(home), original_name)
            return value
        # Names like `__wrapped__` are asked for by whoever inspects a module; the package has none of them to offer.
        if not (name.startswith("__") and name.endswith("__")):
            self._complete()
            if name in self._module.__dict__:
                return self._module.__dict__[name]
        raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")

    def _dir(self) -> list[str]:
        self._complete()
        return sorted(self._module.__dict__)

    def _import(self, submodule: str) -> None:
        importlib.import_module(f"{self._module.__name__}.{submodule}")

    def _complete(self) -> None:
        if self._completed_by == threading.get_ident():
            return
        # A submodule on its way that asks for more than it should is answered as in any circular import: running the
        # rest now would meet it half done.
        if any(self._is_half_done(submodule) for submodule in self._package.submodules):
            return
        with self._lock:
            if "__getattr__" not in self._module.__dict__:
                return
            self._completed_by = threading.get_ident()
            try:
                exec(self._later, self._module.__dict__)
            finally:
                self._completed_by = None
            del self._module.__dict__["__getattr__"], self._module.__dict__["__dir__"]
            autoload.before_submodules(self._module.__name__, None)

    def _is_half_done(self, submodule: str) -> bool:
        """Whether this thread is in the middle of importing `submodule`; wait if another one is."""
        name = f"{self._module.__name__}.{submodule}"
        if _is_initializing(name):
            # The import system waits for another thread, but not for the one that asks.
            importlib.import_module(name)
        return _is_initializing(name)


def _is_initializing(name: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _postponed(body: list[ast.stmt], package: str) -> list[ast.stmt]:
    """Return the statements that import what is not loaded yet, and those that use names which such ones bind."""
    postponed, names = [], set[str]()
    for statement in body:
        nodes = list(ast.walk(statement))
        if not names.intersection(node.id for node in nodes if isinstance(node, ast.Name)) and not any(
            _loads_something(node, package) for node in nodes
        ):
            continue
        postponed.append(statement)
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return postponed


def _loads_something(node: ast.AST, package: str) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name not in sys.modules for alias in node.names)
    if not isinstance(node, ast.ImportFrom) or node.names[0].name == "*":
        # The names behind a star are not known, so they cannot wait.
        return False
    return bool(node.level) or node.module == package or node.module not in sys.modules
