"""A CSV file with one row per optimizer step that survives kills, resumes and full disks."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import one_line

STEP = "step"
# The latter two if somebody has edited the file.
_ERRORS = (OSError, ValueError, csv.Error)


class StepTable:
    """Rows by step. The last row may still grow, as a validation comes after the training line of its step.

    What somebody edits in the file during the run stays, if it remains such a table. No error here ends a run. Up to
    `KEPT` rows that cannot be written are kept until they can.

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
        except _ERRORS as error:
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
        except _ERRORS as error:
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
            header, written = ([], []) if there is None else self._read(self._rows[0][STEP] - 1)
            if there and STEP not in header:
                raise ValueError(f"it has no column {STEP!r} any more")
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

    def _read(self, last_step: int) -> tuple[list[str], list[dict[str, str]]]:
        """Return the header of the file and its whole rows up to a step."""
        with open(self._path, newline="", encoding="utf-8", errors="replace") as file:
            whole = file.read().rpartition("\n")[0]  # a kill may have cut off the last row
        reader = csv.DictReader(io.StringIO(whole))
        return list(reader.fieldnames or ()), [row for row in reader if _is_kept(row, last_step)]

    def _replace(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        content = _lines(columns, [dict(zip(columns, columns, strict=True)), *rows])
        staging = self._path.with_name(f".{self._path.name}.incomplete")
        staging.write_bytes(content)
        os.replace(staging, self._path)
        self._columns, self._end, self._size = columns, len(content), len(content)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = getattr(error, "strerror", None) or one_line(error)
            self._say(
                f"  {self._path} cannot be written: {reason}. Training goes on; up to {self.KEPT} rows are kept "
                "until it can be."
            )


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def _is_kept(row: Mapping[str, str | None], last_step: int) -> bool:
    step = row.get(STEP) or ""
    return step.isdecimal() and int(step) <= last_step and None not in row.values() and None not in row
