"""Numbers in the words of messages."""

import pytest

from litgpt_moe_ext.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (1, "step", "1 step"),
        (1440, "step", "1,440 steps"),
        (0, "process", "0 processes"),
        (2, "training token", "2 training tokens"),
    ],
)
def test_counted(number, noun, words):
    assert counted(number, noun) == words
