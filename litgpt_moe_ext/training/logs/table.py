"""A CSV file with one row per optimizer step that survives kills, resumes and full disks."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STEP = "step"


class StepTable:
    """Rows by step. The last row may still grow, as a validation comes after the training line of its step.

    Nothing here raises an `OSError`. Up to `KEPT` rows that cannot be written are kept until they can.

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
        kept: list[dict[str, str]] = []
        if last_step is not None and self._path.is_file():
            with open(self._path, newline="", encoding="utf-8", errors="replace") as file:
                whole = file.read().rpartition("\n")[0]  # a kill may have cut off the last row
            kept = [row for row in csv.DictReader(io.StringIO(whole)) if _is_kept(row, last_step)]
        self._columns = list(kept[0]) if kept else []
        self._end = 0
        if not kept:
            self._path.unlink(missing_ok=True)
            return {}
        self._replace(kept)
        self._end -= len(self._lines(kept[-1:]))
        self._rows = [{**kept[-1], STEP: int(kept[-1][STEP])}]
        return kept[-1]

    def _write(self) -> None:
        new = list(dict.fromkeys(name for row in self._rows for name in row if name not in self._columns))
        if new or not self._path.is_file():
            self._columns = self._arrange(self._columns, new)
            written: list[dict[str, str]] = []
            if self._end and self._path.is_file():
                with open(self._path, "rb") as file:
                    text = file.read(self._end).decode("utf-8")
                written = list(csv.DictReader(io.StringIO(text, newline="")))
            self._replace(written)
        before, last = self._lines(self._rows[:-1]), self._lines(self._rows[-1:])
        with open(self._path, "r+b") as file:
            file.seek(self._end)
            file.write(before + last)
            file.truncate()
        self._end += len(before)
        del self._rows[:-1]

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        content = self._lines([dict(zip(self._columns, self._columns, strict=True)), *rows])
        staging = self._path.with_name(f".{self._path.name}.incomplete")
        staging.write_bytes(content)
        os.replace(staging, self._path)
        self._end = len(content)

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode("utf-8")

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._say(
                f"  {self._path} cannot be written: {error.strerror or error}. Training goes on; the last "
                f"{self.KEPT} rows are kept until there is room."
            )


def _is_kept(row: Mapping[str, str | None], last_step: int) -> bool:
    step = row.get(STEP) or ""
    return step.isdecimal() and int(step) <= last_step and None not in row.values() and None not in row
