"""A CSV file with one row per optimizer step that survives kills, resumes and full disks."""

import contextlib
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt_moe_ext.files.durable import rename
from litgpt_moe_ext.training.checkpoint.earlier import free_name

STEP = "step"


class StepTable:
    """Rows by step. The last row may still grow, as a validation comes after the training line of its step.

    What somebody edits in the file stays; if it is no such table any more, it gets another name. Nothing here raises an
    `OSError`. Up to `KEPT` rows that cannot be written are kept until they can.

    Args:
        path: The file.
        arrange: Returns all columns in order, given the existing and the new ones.
        say: Told the first time that writing fails.
    """

    KEPT = 1000

    def __init__(
        self, path: Path, arrange: Callable[[Sequence[str], Sequence[str]], list[str]], say: Callable[[str], None]
    ) -> None:
        self._path, self._arrange, self._say = path, arrange, say
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []  # rows that belong at byte `_end` of the file
        self._end = 0
        self._size: int | None = None  # of the file, once it is written
        self._failed = False

    def start(self, last_step: int | None) -> dict[str, str]:
        """Begin a table, or continue the existing one.

        Args:
            last_step: Rows of later steps are dropped; None drops all.

        Returns:
            The last kept row, empty if there is none.
        """
        try:
            return self._start(last_step)
        except OSError as error:
            self._fail(error)
            return {}

    def put(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the row of a step: the last row, or a new one."""
        if self._rows and self._rows[-1][STEP] == step:
            self._rows[-1].update(values)
        else:
            self._rows.append({STEP: step, **values})
        try:
            self._write()
        except OSError as error:
            self._fail(error)
            del self._rows[: -self.KEPT]

    def _start(self, last_step: int | None) -> dict[str, str]:
        kept = [] if last_step is None or not self._path.is_file() else self._read(last_step)[1]
        if not kept:
            self._path.unlink(missing_ok=True)
            return {}
        self._replace(list(kept[0]), kept)
        self._end -= len(_lines(self._columns, kept[-1:]))
        self._rows = [{**kept[-1], STEP: int(kept[-1][STEP])}]
        return kept[-1]

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self._rows for name in row)
        there = self._path.stat().st_size if self._path.is_file() else None
        if there != self._size or not names.keys() <= set(self._columns):
            # A column is new, the last attempt to write failed half-way, or somebody has edited the file.
            header, written = ([], []) if there is None else self._read(self._rows[0][STEP] - 1, missing="")
            present = list(dict.fromkeys([*header, *self._columns]))
            self._replace(self._arrange(present, [name for name in names if name not in present]), written)
        before, last = _lines(self._columns, self._rows[:-1]), _lines(self._columns, self._rows[-1:])
        with open(self._path, "r+b") as file:
            file.seek(self._end)
            file.write(before + last)
            file.truncate()
        self._end += len(before)
        self._size = self._end + len(last)
        del self._rows[:-1]

    def _read(self, last_step: int, missing: str | None = None) -> tuple[list[str], list[dict[str, str]]]:
        """Return the header of the file and its rows up to a step; nothing of what is no such table.

        Args:
            last_step: The step.
            missing: What is in place of cells that a row lacks; None leaves the row out.
        """
        # Spreadsheets write a byte order mark.
        with open(self._path, newline="", encoding="utf-8-sig", errors="replace") as file:
            content = file.read()
        # A kill may have cut off the last row.
        reader = csv.DictReader(io.StringIO(content.rpartition("\n")[0]), restval=missing)
        with contextlib.suppress(csv.Error):  # a field of enormous length
            header = list(reader.fieldnames or ())
            if STEP in header or not content:
                return header, [row for row in reader if _is_kept(row, last_step)]
        aside = free_name(self._path)
        rename(self._path, aside)
        self._say(f"  {self._path} is no table of steps any more, as if somebody had edited it. It is now {aside}.")
        return [], []

    def _replace(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        content = _lines(columns, [dict(zip(columns, columns, strict=True)), *rows])
        staging = self._path.with_name(f".{self._path.name}.incomplete")
        staging.write_bytes(content)
        rename(staging, self._path)
        self._columns, self._end, self._size = columns, len(content), len(content)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._say(
                f"  {self._path} cannot be written: {error.strerror or error}. Training goes on; the last {self.KEPT} "
                "rows are kept until it can be."
            )


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def _is_kept(row: Mapping[str, str | None], last_step: int) -> bool:
    step = row.get(STEP) or ""
    return step.isdecimal() and int(step) <= last_step and None not in row.values() and None not in row
