"""A finding of the doctor."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Verdict = Literal["good", "note", "problem"]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        topic: What was checked.
        verdict: `problem` keeps the recipe from running; `note` is worth knowing.
        text: What was found, and what it means.
    """

    topic: str
    verdict: Verdict
    text: str


def with_warnings(choose: Callable[[], _Result]) -> tuple[_Result, str]:
    """Return what a function returns, and what it warns users of, which belongs to its finding, or an empty text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = choose()
    # Not those of libraries to their programmers.
    texts = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning))
    return result, "".join(f". {text}".removesuffix(".") for text in texts)
