"""Packages whose `__init__` runs in two parts: statements that load nothing big at once, the rest when needed."""

import ast
import importlib
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.lazy_imports.source import compiled, parse


@dataclass(frozen=True)
class Package:
    """The parts of a package that are available before its `__init__` has run to the end.

    Attributes:
        names: Attributes, each imported from the submodule from which the `__init__` imports it.
        submodules: Submodules that can be imported, with their own submodules.
        first: The submodule that is imported first, as all others rely on it.
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
    # Describing a model and its training needs neither lightning nor LitGPT's code for training and chatting.
    "litgpt": Package(
        names=frozenset({"Config", "GPT"}),
        submodules=("args", "config", "constants", "data", "model", "prompts", "tokenizer"),
        first="model",
    ),
}


def execute_split(module: ModuleType, loader: Any) -> None:
    """Execute the first part of the `__init__` of one of `PACKAGES`, and arrange for the rest."""
    tree = parse(module, loader)
    if tree is None:
        with autoload.Executing(module.__name__):
            loader.exec_module(module)
        return
    split = _Split(module, tree, PACKAGES[module.__name__])
    with autoload.Executing(module.__name__):
        exec(split.now, module.__dict__)
    autoload.before_submodules(module.__name__, split.before_submodule)


class _Split:
    """The `__init__` of a package in two parts: the statements that load nothing new, and the rest."""

    def __init__(self, module: ModuleType, tree: ast.Module, package: Package) -> None:
        self._module, self._package = module, package
        later = _postponed(tree.body, module.__name__)
        self.now = compiled(module, [node for node in tree.body if node not in later])
        self._later = compiled(module, later)
        self._bound = _bound(later)
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
        """Run whatever the import of `submodule` may rely on."""
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
        if self._may_offer(name):
            self._complete()
            if name in self._module.__dict__:
                return self._module.__dict__[name]
        raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")

    def _may_offer(self, name: str) -> bool:
        # Inspection asks for names like `__wrapped__`; jsonargparse does so for every class that it meets.
        if name.startswith("__") and name.endswith("__"):
            return False
        if self._bound is None or name in self._bound:
            return True
        return PathFinder.find_spec(f"{self._module.__name__}.{name}", self._module.__path__) is not None

    def _dir(self) -> list[str]:
        self._complete()
        return sorted(self._module.__dict__)

    def _import(self, submodule: str) -> None:
        importlib.import_module(f"{self._module.__name__}.{submodule}")

    def _complete(self) -> None:
        if self._completed_by == threading.get_ident():
            return
        # A submodule that needs the rest while it is being imported fails as in any circular import: running the rest
        # now would find it half initialised.
        if any(self._is_half_done(submodule) for submodule in self._package.submodules):
            return
        with autoload.Executing(self._module.__name__), self._lock:
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
        """Return whether this thread is in the middle of importing `submodule`; wait if another thread is."""
        name = f"{self._module.__name__}.{submodule}"
        if autoload.is_initializing(name):
            # The import system waits for other threads, but not for this one.
            importlib.import_module(name)
        return autoload.is_initializing(name)


def _postponed(body: list[ast.stmt], package: str) -> list[ast.stmt]:
    """Return the statements that import modules that are not loaded yet, and those that use names bound by these."""
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


def _bound(body: list[ast.stmt]) -> set[str] | None:
    """Return the names that statements may bind; None if a star import leaves them unknown."""
    names = set[str]()
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return None if "*" in names else names


def _loads_something(node: ast.AST, package: str) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name not in sys.modules for alias in node.names)
    if not isinstance(node, ast.ImportFrom) or node.names[0].name == "*":
        # The names of a star import are unknown, so it cannot wait.
        return False
    return bool(node.level) or node.module == package or node.module not in sys.modules
