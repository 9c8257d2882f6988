"""What a terminal can do."""

import io

import pytest

from litgpt_moe_ext.terminal import redraws


class Terminal(io.StringIO):
    """A stream to a terminal."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


@pytest.mark.parametrize(
    ("name", "does"), [("xterm-256color", True), ("dumb", False), ("unknown", False), (None, True)]
)
def test_where_a_bar_can_be_drawn(name, does, monkeypatch):
    """A run in a terminal that cannot has lines: Rich would show nothing there until its end."""
    if name is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", name)
    assert redraws(Terminal()) is does
    assert not redraws(io.StringIO())
