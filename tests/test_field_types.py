"""Types of settings with a range."""

import math
import re

import pytest

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import NUMBERS, PositiveInt, checked


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_a_range_is_what_its_words_say(kind):
    limits = re.findall(r"(above|at least|from|below|at most|to) ([\de]+)", NUMBERS[kind])
    integer = issubclass(kind, int)
    if len(limits) == 1:
        limits.append(("at most", 2**63 - 1) if integer else ("below", math.inf))
    for word, number in limits:
        limit = int(number) if integer else float(number)
        outward = -1 if word in ("above", "at least", "from") else 1
        outside, inside = (
            limit + way if integer else math.nextafter(limit, way * math.inf) for way in (outward, -outward)
        )
        allowed, refused = (inside, limit) if word in ("above", "below") else (limit, outside)
        assert checked("x", allowed, kind) == allowed
        with pytest.raises(SettingsError, match="x: .* must be an? "):
            checked("x", refused, kind)


def test_an_error_shows_the_beginning_of_what_is_long():
    with pytest.raises(SettingsError) as raised:
        checked("x", "a" * 1000, PositiveInt)
    assert str(raised.value) == f"x: '{'a' * 199} ... must be an integer of at least 1"
