"""The error that every check raises, common endings of its message, and how a command ends with it.

Of this package it imports only `interruption` and `wording`, so that every module can import it.
"""

import errno
import io
import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from litgpt_moe_ext.interruption import Terminated, interruptible, interruption_behind
from litgpt_moe_ext.wording import in_shell

CANNOT = 1
"""Exit status: the input is right, but the answer is no, or the work cannot go on."""
WRONG_SETTING = 2
"""Exit status: a setting or an input is wrong."""
PERHAPS_OF_AN_EXTENSION = "; if an extension adds it, install the extension's package (docs/how-to/extend.md)"
"""The end of a message about an unknown field of the model, or an unknown name in one."""
FROM_ITS_WEIGHTS = "start a new run from its weights with initial_checkpoint_dir and another out_dir"
"""The remedy for a checkpoint from which a run cannot resume."""

# Windows calls a pipe without a reader an invalid argument.
_NO_READER = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_ALLOW = "have its owner make it readable, or writable, for you, or name another path"


class SettingsError(ValueError):
    """A setting or an input of the user is wrong.

    Only checks of user input raise it: command lines print it as one line, while other errors keep their traceback. The
    message is one line of the form ``name: value must be ...; remedy``, where the name is the setting as the user
    writes it (``train.max_norm``, ``model_config.n_expert``).
    """

    @property
    def setting(self) -> str:
        """Name of the setting, as the message begins; empty if it names none."""
        name = str(self).partition(":")[0]
        return name if name.replace(".", "_").replace("-", "_").isidentifier() else ""


def refuse_first(messages: Iterable[str]) -> None:
    """Raise SettingsError with the first of some messages, if there is one.

    Args:
        messages: What is wrong; often a generator, as of a rule about several settings.
    """
    for message in messages:
        raise SettingsError(message)


def exit_status(run: Callable[[], int | None], interrupted: str = "") -> int:
    """Run a command and return its exit status, with wrong settings as one line on standard error.

    Only `SettingsError`, a full disk and a file that the user may not read or write are the user's to fix, and a closed
    output pipe is no error. Every other exception is a fault of the program or of the machine, and keeps its traceback;
    Python's exit status for it is 1. After Ctrl-C or SIGTERM the status is 130 or 143.

    Args:
        run: Returns an exit status, or None for success.
        interrupted: What to say after Ctrl-C or SIGTERM, instead of their name.
    """

    def end(number: signal.Signals) -> int:
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        print(interrupted or f"Stopped by {name}.", file=sys.stderr, flush=True)
        return 128 + number

    with _streams(), interruptible(end), _any_text():
        try:
            status = run() or 0
            sys.stdout.flush()  # while an error has one line
            return status
        except (KeyboardInterrupt, Terminated, Exception) as error:
            if number := interruption_behind(error):
                return end(number)
            if isinstance(error, SettingsError):
                print(f"error: {error}", file=sys.stderr)
                return WRONG_SETTING
            if isinstance(error, OSError) and error.errno in _NO_READER and _is_unread(sys.stdout):
                return CANNOT
            if isinstance(error, OSError) and is_full(error):
                where = f"{error.filename}: " if error.filename else ""
                print(
                    f"error: {where}{error.strerror}; free some space and run the same command again", file=sys.stderr
                )
                return CANNOT
            if isinstance(error, OSError) and error.errno in _NOT_ALLOWED and error.filename:
                print(f"error: {error.filename}: {error.strerror}; {_ALLOW}", file=sys.stderr)
                return WRONG_SETTING
            raise


def is_full(error: OSError) -> bool:
    """Return whether an error says that a disk, or a share of one, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_unread(stream: TextIO) -> bool:
    """Return whether nobody reads an output any more; if so, keep the process from complaining about it at its end."""
    try:
        descriptor = stream.fileno()
        if os.name == "nt":  # without a poll: the error has said so, unless the output goes elsewhere
            unread = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        else:
            pipe = select.poll()
            pipe.register(descriptor, 0)
            unread = any(event & select.POLLERR for _, event in pipe.poll(0))
        if unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return unread
    except (OSError, ValueError):  # a replaced stream has no descriptor
        return False


@contextmanager
def _streams() -> Iterator[None]:
    """Replace, in the scope, streams that whoever started the process has closed (`>&-`), as some daemons do.

    Otherwise the next files to be opened would get their numbers, and libraries would write into them.
    """
    with ExitStack() as opened:
        if sys.stdin is None:  # and stays so, for commands that must ask
            opened.enter_context(open(os.devnull, encoding="utf-8"))
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, opened.enter_context(open(os.devnull, "w", encoding="utf-8")))
                opened.callback(setattr, sys, name, None)
        yield


@contextmanager
def _any_text() -> Iterator[None]:
    """Print question marks, in the scope, for characters that an encoding lacks, or bytes of a file's name."""
    with ExitStack() as changed:
        for stream in (sys.stdout, sys.stderr):
            # The second, which Windows has, knows a way for the bytes only.
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                changed.callback(_set_errors, stream, stream.errors)
                _set_errors(stream, "replace")
        yield


def _set_errors(stream: io.TextIOWrapper, errors: str) -> None:
    with suppress(OSError, ValueError):  # the stream is flushed first, and may be closed or full
        stream.reconfigure(errors=errors)


def one_line(error: object) -> str:
    """Return the message of an error, which may have many lines, as one line."""
    return " ".join(str(error).split())


def undecoded(text: str) -> str | None:
    """Return the remedy for a path or a word of a command line that Python could not decode; None if it could."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            os.fsencode(text).decode("utf-8")
        except UnicodeError:
            return "it has bytes that are no letters in UTF-8; write, or rename, it in UTF-8"
        return f"Python takes names and arguments for {sys.getfilesystemencoding()} here; set PYTHONUTF8=1"
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the known name most similar to `name`, or nothing if none is similar."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near}?"


def did_you_mean_recipe(path: Path, usual: str = "configs") -> str:
    """Return the same for a missing YAML file: one with a similar name next to it, or in its usual folder."""
    by_name = {
        file.stem: str(file)
        for folder in (Path(usual), path.parent)
        if folder.is_dir()
        for file in sorted(folder.glob("*.yaml"))
    }
    near = nearest(path.stem, by_name)
    return "" if near is None else f"; did you mean {by_name[near]}?"


def which_checkpoint(folder: Path, file: str) -> str:
    """Return what to name instead of a folder that lacks a file of LitGPT's checkpoints, or how to convert it.

    Args:
        folder: The folder that was named; it need not exist.
        file: The missing file.
    """
    if found := in_shards(folder / file) or did_you_mean_inside(folder, file):
        return found
    return how_to_import(folder) or "; name a checkpoint (step-*, best, final)"


def how_to_import(folder: Path) -> str:
    """Return how to convert a folder with a model of Hugging Face's; nothing for others."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return ""
    return f"; `litgpt-moe import {in_shell(folder)} NEW_DIR` makes a checkpoint of Hugging Face's"


def in_shards(file: Path) -> str:
    """Return how to join the shards of a model of which there is a folder instead of a file; nothing without one."""
    if not file.is_dir():
        return ""
    script = file / "zero_to_fp32.py"  # DeepSpeed puts it beside its shards
    if script.is_file():
        join = f"{in_shell('python', script, file, 'NEW_DIR')}` joins DeepSpeed's into NEW_DIR/pytorch_model.bin"
    else:
        join = f"{in_shell('fabric', 'consolidate', file)}` joins FSDP's"
    return f", but there is a folder of that name with shards; `{join}"


def did_you_mean_inside(folder: Path, pattern: str) -> str:
    """Return the same for a folder that lacks a file which its subfolders have, as a run's checkpoints do.

    Args:
        folder: The folder that was named; it need not exist.
        pattern: The file, as a glob.
    """
    inside = sorted({file.parent for file in folder.glob(f"*/{pattern}") if not file.parent.name.startswith(".")})
    if not inside:
        return ""
    return f"; did you mean {next((found for found in inside if found.name == 'final'), inside[-1])}?"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the known name most similar to `name`, or None if none is as similar as the cutoff of `difflib` says."""
    import difflib

    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None
