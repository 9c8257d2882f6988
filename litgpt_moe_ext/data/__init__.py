"""Data modules that recipes name by class path, and the tools they are built from.

The classes are resolved on first access: they derive from `litgpt.data.DataModule`, whose import takes seconds, and
preparing a corpus needs neither LitGPT nor torch. A corpus (`litgpt_moe_ext.data.corpora`) becomes a data module here.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CodeParrot": "corpora.code_parrot",
    "DocumentCorpus": "corpora.documents",
    "FineWeb": "corpora.fineweb",
    "HubDataset": "corpora.hub_dataset",
    "Mixture": "modules.mixture",
    "PreparedCorpus": "corpora.prepared",
    "PythonStdlib": "corpora.python_stdlib",
    "TextCorpus": "corpora.text_corpus",
    "TinyStories": "corpora.tiny_stories",
    "TokenLoader": "loader",
    "TokenShards": "modules.token_shards",
    "WandbCorpus": "corpora.prepared",
}
# Modules that recipes can name.
MODULES = tuple(name for name in _HOMES if name not in ("DocumentCorpus", "TokenLoader"))


def import_path(name: str) -> str:
    """Return the import path of a LitGPT or plugin data module from its bare name.

    Args:
        name: Such as `TinyStories`; if both have a class of that name, LitGPT's is meant, as in its recipes. Names with
            a dot, and unknown names, are returned unchanged.
    """
    if "." in name:
        return name
    import litgpt.data

    homes = {**dict.fromkeys(MODULES, __name__), **dict.fromkeys(litgpt.data.__all__, litgpt.data.__name__)}
    return f"{homes[name]}.{name}" if name in homes else name


def corpus_named(name: str) -> Any:
    """Return the class of a corpus that is not a data module, so it needs neither LitGPT nor torch."""
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = corpus_named(name)
    if _HOMES[name].startswith("corpora."):
        from litgpt_moe_ext.data.modules.corpus import as_data_module

        value = as_data_module(value)
    globals()[name] = value  # the next access is an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
