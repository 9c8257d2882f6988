"""The base class of corpora: common settings, and preparation."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.field_types import NonNegativeInt, PositiveInt, check_fields


@dataclass(kw_only=True)
class Corpus:
    """A corpus: where its documents come from, and how training reads them.

    The class needs neither torch nor LitGPT, so scripts start fast. `litgpt_moe_ext.data.NAME` is the same class as a
    LitGPT data module; see `litgpt_moe_ext.data.modules.corpus.as_data_module`.
    """

    packing: Literal["stream", "best_fit", "pad"] = "stream"
    """How documents fill the windows. `stream`: one after another, cut where a window ends. `best_fit`: as many whole
    documents as fit, then padding, which the loss ignores. `pad`: one document per window, then padding."""
    shuffle: bool = True
    """Whether to shuffle the windows; otherwise they keep the order of the documents."""
    seed: NonNegativeInt = 42
    """Seed of the order of the windows, and of the choice of validation documents if no files are given for them."""
    train_count: PositiveInt | None = None
    """Number of documents to train on, from the first. Default: all."""
    val_count: PositiveInt | None = None
    """Number of documents to validate on, from the first. Default: all."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")

    def prepare(self, verbose: bool = True, tokenizer: Any = None) -> Path:
        """Prepare the corpus if needed and return its folder; safe in several processes at once.

        Args:
            verbose: Whether to show progress, and to print a line even if there is nothing to do.
            tokenizer: A `litgpt.Tokenizer` to encode with if the settings name none.

        Raises:
            SettingsError: A setting or a file is wrong.
        """
        raise NotImplementedError

    @property
    def document_limits(self) -> tuple[int | None, int | None]:
        """How many documents of the prepared corpus to train and to validate on, from the first; None: all."""
        return None, None

    def planned_vocabulary(self) -> tuple[str, int] | None:
        """Return the setting that determines the vocabulary size, with its value, and the size.

        None if only the prepared corpus determines it.
        """
        return None

    def planned_borders(self) -> tuple[int, int | None] | None:
        """Return the ids of the tokens that will end and begin every document; None for the latter if none will.

        None if the settings do not determine them.
        """
        return None


def full_docstring(corpus: type[Corpus]) -> str:
    """Return the docstring of a corpus with all its fields, inherited ones too, for jsonargparse's `--help`."""
    from docstring_parser import parse_from_object

    found = {}
    for base in reversed(corpus.__mro__[:-1]):
        for parameter in parse_from_object(base).params:
            found[parameter.arg_name] = " ".join((parameter.description or "").split())
    lines = [f"    {name}: {text}" for name, text in found.items()]
    return "\n".join([inspect.cleandoc(corpus.__doc__ or ""), "", "Args:", *lines])
