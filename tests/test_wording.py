"""Numbers, paths and commands in the words of messages."""

import shlex
from pathlib import Path

import pytest

from litgpt_moe_ext import wording
from litgpt_moe_ext.wording import counted, in_shell, quoted


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


@pytest.mark.parametrize(
    ("windows", "path", "shown"),
    [(False, "a\\b\n", r"'a\\b\n'"), (True, "C:\\my runs\\a", r"'C:\my runs\a'"), (True, "it's", '"it\'s"')],
)
def test_a_path_is_shown_as_it_is_typed(monkeypatch, windows, path, shown):
    monkeypatch.setattr(wording, "_WINDOWS", windows)
    assert quoted(path) == shown


def test_the_shell_of_each_system_divides_a_command_into_its_words(monkeypatch):
    words = ("litgpt", "chat", "my runs\\final", "--seed", "1")
    assert shlex.split(in_shell(*words)) == list(words)
    monkeypatch.setattr(wording, "_WINDOWS", True)
    assert in_shell(*words) == r'litgpt chat "my runs\final" --seed 1', (
        "neither PowerShell nor cmd knows others for both"
    )
    assert in_shell(Path("runs")) == "runs"
