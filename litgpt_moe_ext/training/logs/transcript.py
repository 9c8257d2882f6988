"""`train.log`: the lines that the terminal showed, whoever printed them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from litgpt_moe_ext.training.logs import TRANSCRIPT_FILE

_CONTROL = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")


class Transcript:
    """Keeps lines until there is a file for them, and writes them to it from then on.

    Writing that fails never raises an error: it is said once, and what could not be written is lost.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self._failed = False

    def open(self, path: Path) -> None:
        """Append to a file from now on, first the lines so far."""
        waiting, self._waiting = self._waiting, []
        try:
            self._file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 closed by `close`
        except OSError as error:
            self._fail(error)
        self.add("".join(waiting))

    def close(self) -> None:
        """Write no more."""
        file, self._file = self._file, None
        self._failed = True
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def line(self, text: str) -> None:
        """Add a line."""
        self.add(f"{text}\n")

    def add(self, text: str) -> None:
        """Add text as it was written to a terminal: of a line that was drawn again and again, the last state counts."""
        text = _CONTROL.sub("", text)
        file = self._file
        if file is None:
            if not self._failed:
                self._waiting.append(text)
            return
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            self._fail(error)
        except ValueError:  # the end of the run has closed it, while a thread said that a signal has come
            return

    def _fail(self, error: OSError) -> None:
        self.close()
        print(f"  {TRANSCRIPT_FILE} cannot be written: {error.strerror or error}. Training goes on without it.")

    def record(self) -> tuple[_Recorder, _Recorder]:
        """Take down what is written to standard output and standard error from now on.

        Called again where a bar has put itself between the program and the terminal: what it lets through counts.
        """
        recorders = _Recorder(sys.stdout, self), _Recorder(sys.stderr, self)
        sys.stdout, sys.stderr = recorders  # pyrefly: ignore[bad-assignment]  (as good as a stream)
        return recorders

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Take down what is written to standard output and standard error in the scope."""
        before = sys.stdout, sys.stderr
        recorders = self.record()
        try:
            yield
        finally:
            # What somebody else put there in the meantime stays.
            if sys.stdout is recorders[0]:
                sys.stdout = before[0]
            if sys.stderr is recorders[1]:
                sys.stderr = before[1]


class _Recorder:
    """A stream that passes everything on, and whole lines to a transcript.

    A full disk or a reader that went away does not end what was writing.
    """

    def __init__(self, stream: TextIO, transcript: Transcript) -> None:
        self._stream, self._transcript = stream, transcript
        self._line = ""
        self._broken = False

    @property
    def rich_proxied_file(self) -> TextIO:
        """The stream itself, to which rich's bars go: they are not for files."""
        return self._stream

    def write(self, text: str) -> int:
        with self._unharmed():
            self._stream.write(text)
        self._line += text
        whole, newline, self._line = self._line.rpartition("\n")
        if newline:
            lines = (line.rstrip("\r").rpartition("\r")[2] for line in whole.split("\n"))
            self._transcript.add("".join(f"{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        with self._unharmed():
            self._stream.flush()

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._broken:
                self._broken = True
                self._transcript.line(f"  the output cannot be written: {error.strerror or error}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
