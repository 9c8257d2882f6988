"""What the commands share: tables, progress, and files that are whole or not there."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import SettingsError, is_full
from litgpt_moe_ext.files.durable import is_stream, replacing


def write_json(path: Path, content: Any) -> None:
    """Write JSON to `path`, whole or not at all; numbers that are not finite become null; creates missing folders."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    # JSON has no others.
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(path: Path, text: str) -> None:
    """Write text to `path`, whole or not at all; creates missing folders."""
    write_bytes(path, text.encode("utf-8", "replace"))  # file names may have bytes that are not text


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path`, whole or not at all; creates missing folders.

    Something that is not a file, such as /dev/stdout, is written to directly; of a link, the target is replaced.

    Raises:
        SettingsError: If it cannot be written, as on a full disk.
    """
    given, path = path, path.resolve() if path.is_symlink() and not is_stream(path) else path
    try:
        if is_stream(path):
            if sys.stdout is not None:
                sys.stdout.flush()  # what was printed before comes before
            with open(path, "ab") as stream:
                stream.write(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        remedy = "free some space, or name another place" if is_full(error) else "name another place"
        raise SettingsError(f"{given} cannot be written ({error.strerror or error}); {remedy}") from error


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is aligned to the left, the others to the right.

    Of the first column, cells stay whole if they leave room for those of the others.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = list(rows)
    widths = [max((cell_len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    console = Console(highlight=False)
    whole = sum(widths) + 2 * len(columns) + 2 <= console.width  # with the space between, and around
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        # A long name must not fold the numbers, or leave no room for them.
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0 and whole, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that advances a progress bar on standard error by a number of steps.

    Nothing is drawn where standard error is not a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:  # where a bar of rich 14 would end in an empty line, even if disabled
        yield lambda steps: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)
