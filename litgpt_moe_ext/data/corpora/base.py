"""What every corpus has: settings, and a way to a prepared folder."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.field_types import NonNegativeInt, check_fields


@dataclass(kw_only=True)
class Corpus:
    """A corpus: where its documents come from, and how training reads them.

    The class needs neither torch nor LitGPT, so a script prepares it at once. `litgpt_moe_ext.data.NAME` is the same
    class as a LitGPT data module; see `litgpt_moe_ext.data.modules.corpus.as_data_module`.
    """

    packing: Literal["stream", "best_fit", "pad"] = "stream"
    """How documents fill the windows. `stream`: one after the other, cut where a window ends. `best_fit`: whole, as
    many as fit, and padding that the loss leaves out. `pad`: one document a window, and padding."""
    shuffle: bool = True
    """Whether the windows come in a random order, or in that of the documents."""
    seed: NonNegativeInt = 42
    """Decides the order of the windows, and which documents validate where no files are named for it."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")

    def prepare(self, verbose: bool = True, tokenizer: Any = None) -> Path:
        """Prepare the corpus if needed and return its folder; safe in several processes at once.

        Args:
            verbose: Whether to show progress, and to print a line also when there is nothing to do.
            tokenizer: A `litgpt.Tokenizer` to encode with if the settings name none.

        Raises:
            SettingsError: A setting or a file is wrong.
        """
        raise NotImplementedError

    @property
    def document_limits(self) -> tuple[int | None, int | None]:
        """How many documents of the prepared corpus to train on and to validate on, the first; None: all."""
        return None, None

    def planned_vocabulary(self) -> tuple[str, int] | None:
        """Return the setting that decides the size of the vocabulary, with its value, and the size.

        None if only the prepared corpus tells.
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
