"""Data modules that recipes name by class path, and the tools they are built from.

The classes are resolved on first access: they derive from ``litgpt.data.DataModule``, whose import takes seconds, and
preparing a corpus needs neither LitGPT nor torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt_moe_ext.data.loader import TokenLoader
    from litgpt_moe_ext.data.modules.prepared import PreparedCorpus, WandbCorpus
    from litgpt_moe_ext.data.modules.python_stdlib import PythonStdlib
    from litgpt_moe_ext.data.modules.text import CodeParrot, HubDataset, TextCorpus, TinyStories
    from litgpt_moe_ext.data.modules.token_shards import TokenShards

__all__ = [
    "CodeParrot",
    "HubDataset",
    "PreparedCorpus",
    "PythonStdlib",
    "TextCorpus",
    "TinyStories",
    "TokenLoader",
    "TokenShards",
    "WandbCorpus",
]

_HOME = {
    "CodeParrot": "litgpt_moe_ext.data.modules.text",
    "HubDataset": "litgpt_moe_ext.data.modules.text",
    "PreparedCorpus": "litgpt_moe_ext.data.modules.prepared",
    "PythonStdlib": "litgpt_moe_ext.data.modules.python_stdlib",
    "TextCorpus": "litgpt_moe_ext.data.modules.text",
    "TinyStories": "litgpt_moe_ext.data.modules.text",
    "TokenLoader": "litgpt_moe_ext.data.loader",
    "TokenShards": "litgpt_moe_ext.data.modules.token_shards",
    "WandbCorpus": "litgpt_moe_ext.data.modules.prepared",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access is an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
