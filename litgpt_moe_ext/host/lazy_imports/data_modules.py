"""LitGPT's data modules without lightning, which defines their base class, for processes that only describe a run.

The module that defines `litgpt.data.DataModule` is executed from its own source, with a stand-in for lightning's class.
Once lightning is loaded, by an import or because a data module needs an attribute that only lightning's class has, that
class replaces the stand-in, also in the data modules that exist by then.
"""

import ast
import importlib
from types import ModuleType
from typing import Any

from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.lazy_imports.source import compiled, parse

MODULE = "litgpt.data.base"
_NAME, _PACKAGE, _HOME = "LightningDataModule", "lightning", "lightning.pytorch.core.datamodule"


def postpone() -> None:
    """Let data modules do without lightning, unless they are already loaded."""
    autoload.execute_with(MODULE, _execute)


def _execute(module: ModuleType, loader: Any) -> None:
    tree = parse(module, loader)
    body = [] if tree is None else [node for node in tree.body if not _imports_base(node)]
    if tree is None or len(body) != len(tree.body) - 1:
        loader.exec_module(module)
        return
    stand_in, made = _stand_in()
    module.__dict__[_NAME] = stand_in
    exec(compiled(module, body), module.__dict__)

    def put_in_place(home: ModuleType) -> None:
        real = module.__dict__[_NAME] = getattr(home, _NAME)
        for cls in stand_in.__subclasses__():
            cls.__bases__ = tuple(real if base is stand_in else base for base in cls.__bases__)
        for data in made:
            real.__init__(data)

    autoload.when_imported(_HOME, put_in_place)


def _imports_base(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.ImportFrom) and node.module == _PACKAGE and [alias.name for alias in node.names] == [_NAME]
    )


def _stand_in() -> tuple[type, list[Any]]:
    """Return a stand-in for lightning's class, and the list of its instances."""
    made: list[Any] = []

    class LightningDataModule:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)

        def __getattr__(self, name: str) -> Any:
            if not (name.startswith("__") and name.endswith("__")):
                importlib.import_module(_HOME)
                if LightningDataModule not in type(self).__mro__:
                    return getattr(self, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    return LightningDataModule, made
