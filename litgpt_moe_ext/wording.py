"""Wording of numbers, paths and commands in messages."""

import os
import shlex

_WINDOWS = os.name == "nt"


def quoted(path: object) -> str:
    """Return a path in quotes, with everything in it visible; on Windows as it is typed, with single backslashes."""
    text = repr(str(path))
    return text.replace("\\\\", "\\") if _WINDOWS else text


def in_shell(*words: object) -> str:
    """Return a command for the shell of this system, which divides it into these words and no others."""
    if _WINDOWS:
        from subprocess import list2cmdline  # not for every import of this module

        return list2cmdline(map(str, words))
    return shlex.join(map(str, words))


def abbreviated(number: float, prefixes: str = "kMBT", gap: str = "") -> str:
    """Return a large number in three digits with a prefix: 950, 12.3k, 4.56M, 1.2B, 15T.

    Args:
        number: The number.
        prefixes: Prefixes of a thousand, a million, and so on.
        gap: Text between digits and prefix.
    """
    for power in range(len(prefixes), 0, -1):
        if number >= 0.9995 * 1000**power:  # what three digits round to it
            return f"{number / 1000**power:.3g}{gap}{prefixes[power - 1]}"
    return f"{number:.0f}{gap}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 1,440 steps, 2 processes.

    Args:
        number: How many.
        noun: The noun in the singular, whose plural must end in `s` or `es`. Words may precede it, as in `training
            token`.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
