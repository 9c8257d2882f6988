"""What the doctor says of one thing that it has looked at."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        topic: What was looked at.
        verdict: `problem` keeps the recipe from running; `note` is worth knowing.
        text: What was found, and what it means.
    """

    topic: str
    verdict: Verdict
    text: str
