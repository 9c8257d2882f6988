"""`train.log`: all lines that the process printed, whoever printed them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from litgpt_moe_ext.training.logs import TRANSCRIPT_FILE

_CONTROL = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")


class Transcript:
    """Keeps lines until there is a file for them, then writes them to it.

    A failure to write raises no error: it is reported once, and the lines are lost.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self._failed = False

    def open(self, path: Path) -> None:
        """Append the lines so far, and all later ones, to a file."""
        waiting, self._waiting = self._waiting, []
        try:
            self._file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 closed by `close`
        except OSError as error:
            self._fail(error)
        self.add("".join(waiting))

    def close(self) -> None:
        """Stop writing."""
        file, self._file = self._file, None
        self._failed = True
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def line(self, text: str) -> None:
        """Add a line."""
        self.add(f"{text}\n")

    def add(self, text: str) -> None:
        """Add text written to a terminal, without control sequences."""
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
        except ValueError:  # closed by the end of the run while a thread was reporting a signal
            return

    def _fail(self, error: OSError) -> None:
        self.close()
        print(f"  {TRANSCRIPT_FILE} cannot be written: {error.strerror or error}. Training goes on without it.")

    def record(self) -> tuple[_Recorder, _Recorder]:
        """Record standard output and standard error from now on.

        Call it again after a progress bar has replaced the streams, to record what passes through the bar.
        """
        recorders = _Recorder(sys.stdout, self), _Recorder(sys.stderr, self)
        sys.stdout, sys.stderr = recorders  # pyrefly: ignore[bad-assignment]  (as good as a stream)
        return recorders

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record standard output and standard error within the scope."""
        before = sys.stdout, sys.stderr
        recorders = self.record()
        try:
            yield
        finally:
            for recorder in recorders:
                recorder.give_up()
            # Leave streams alone that other code has replaced in the meantime.
            if sys.stdout is recorders[0]:
                sys.stdout = before[0]
            if sys.stderr is recorders[1]:
                sys.stderr = before[1]


class _SafeStream:
    """A stream that a full disk, a closed pipe or a terminal that is gone does not turn into an error of its writer.

    Args:
        stream: The stream to write to.
        transcript: Told once that writing fails.
    """

    def __init__(self, stream: TextIO, transcript: Transcript) -> None:
        self._stream, self._transcript = stream, transcript
        self._broken = False

    def write(self, text: str) -> int:
        with self._unharmed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unharmed():
            self._stream.flush()

    def give_up(self) -> None:
        """Drop what the stream still cannot write; Python would fail to, and end a finished run as a failed one."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # a replaced stream has no descriptor
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())
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


class _Recorder(_SafeStream):
    """A stream that also copies complete lines to a transcript; of a redrawn line, only the last state."""

    def __init__(self, stream: TextIO, transcript: Transcript) -> None:
        super().__init__(stream, transcript)
        self._line = ""

    @property
    def rich_proxied_file(self) -> _SafeStream:
        """The underlying stream, to which rich draws its bars, past the transcript."""
        return _SafeStream(self._stream, self._transcript)

    def write(self, text: str) -> int:
        super().write(text)
        self._line += text
        whole, newline, self._line = self._line.rpartition("\n")
        if newline:
            lines = (line.rstrip("\r").rpartition("\r")[2] for line in whole.split("\n"))
            self._transcript.add("".join(f"{line}\n" for line in lines))
        return len(text)
