"""The source of a module that is being imported, as a syntax tree and back."""

import ast
from types import CodeType, ModuleType
from typing import Any


def parse(module: ModuleType, loader: Any) -> ast.Module | None:
    """Return the syntax tree of a module, or None if it has no source."""
    source = loader.get_source(module.__name__) if hasattr(loader, "get_source") else None
    return None if source is None else ast.parse(source)


def compiled(module: ModuleType, body: list[ast.stmt]) -> CodeType:
    """Return statements as code of a module."""
    return compile(ast.Module(body, type_ignores=[]), module.__file__ or "<unknown>", "exec", dont_inherit=True)
