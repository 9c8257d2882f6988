"""A finding of the doctor."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "note", "problem"]


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
