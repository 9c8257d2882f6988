"""Tests of many cases, of which the default tests take a few."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def soon(cases: Iterable[Any], chosen: Collection[Any], key: Callable[[Any], Any] = lambda case: case) -> list[Any]:
    """Return the parameters of a test, of which those that are not chosen are slow.

    Args:
        cases: All parameters.
        chosen: Those of the default tests.
        key: Returns what `chosen` has of a case.
    """
    cases = list(cases)
    if unknown := set(chosen) - {key(case) for case in cases}:
        raise ValueError(f"{unknown} are none of the cases {cases}")
    return [case if key(case) in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]
