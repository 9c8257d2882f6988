"""How commands end that Ctrl-C, SIGTERM or a full disk stops."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from litgpt_moe_ext import interruption
from litgpt_moe_ext.cli.output import write_text
from litgpt_moe_ext.data.pipeline import encoding
from litgpt_moe_ext.data.pipeline.batches import Batch
from litgpt_moe_ext.errors import CANNOT, WRONG_SETTING, SettingsError, exit_status
from litgpt_moe_ext.interruption import end_at_once_on_termination
from tests.runs import PATIENCE, RUN_TRAIN, run_command

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "data_prep").glob("*.py"))
MODEL_CARD = [sys.executable, "-m", "litgpt_moe_ext.cli.main", "model-card"]


class ExtensionFileLoader:
    """Loads as Python's does an extension module that drops what its imports raise."""

    loaded = False

    def create_module(self, number):
        try:
            signal.raise_signal(number)
            self.loaded = True
        except BaseException:
            pass


BOTH = pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])


def wait(seconds=5.0):
    """Sleep in short bits: what another thread raises does not end a sleep."""
    for _ in range(int(seconds * 100)):
        time.sleep(0.01)


@BOTH
def test_an_extension_module_is_loaded_before_a_signal_counts(number, name, capsys):
    loader, went_on = ExtensionFileLoader(), []

    def run():
        loader.create_module(number)
        wait()
        went_on.append(True)

    assert exit_status(run) == 128 + number
    assert loader.loaded
    assert not went_on
    assert capsys.readouterr().err == f"Stopped by {name}.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@BOTH
def test_a_signal_that_comes_twice_counts_once(number, name, monkeypatch, capsys):
    """As from `timeout`, in the midst of clearing up, and of Python's own after it; a later one counts."""
    cleared = []
    monkeypatch.setattr(interruption, "_MOMENT", 600)

    def run():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleared.append(True)

    assert exit_status(run) == 128 + number
    assert cleared
    assert capsys.readouterr().err == f"Stopped by {name}.\n"
    if number == signal.SIGINT:
        signal.raise_signal(number)
        monkeypatch.setattr(interruption, "_MOMENT", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@BOTH
def test_postponed_signals_are_not_left_to_the_next_scope(number, name, capsys):
    """When more than one came before the first could count."""

    def run():
        with interruption.uninterrupted():
            signal.raise_signal(number)
            time.sleep(0.8 * interruption._LOOK_EVERY)
            signal.raise_signal(number)
        wait()

    assert exit_status(run) == 128 + number
    assert capsys.readouterr().err == f"Stopped by {name}.\n"
    assert exit_status(lambda: wait(2 * interruption._LOOK_EVERY)) == 0


def test_a_signal_right_after_another_counts(capsys):
    """As where a chat ends an answer on Ctrl-C, and a supervisor wants it gone."""

    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)

    assert exit_status(run) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "Stopped by SIGTERM.\n"


class Finalized:
    """Is interrupted in its finalizer, or in the callback of a reference to it."""

    def __init__(self, number, by_callback):
        self.number = None if by_callback else number
        self.reference = by_callback and weakref.ref(self, lambda _: signal.raise_signal(number))

    def __del__(self):
        if self.number:
            signal.raise_signal(self.number)


@BOTH
@pytest.mark.parametrize("by_callback", [False, True])
def test_a_signal_in_a_finalizer_is_not_dropped(number, name, by_callback, capsys):
    def run():
        finalized = Finalized(number, by_callback)
        reference = finalized.reference  # noqa: F841  (a reference that is gone calls nothing)
        del finalized
        wait()
        went_on.append(True)

    went_on, hook = [], sys.unraisablehook
    assert exit_status(run) == 128 + number
    assert not went_on
    assert capsys.readouterr().err == f"Stopped by {name}.\n"
    assert sys.unraisablehook is hook


@BOTH
@pytest.mark.parametrize("error", [RuntimeError("a worker is gone"), SettingsError("x: 1 must be 2")])
def test_what_comes_of_a_signal_is_no_error(number, name, error, capsys):
    def run():
        try:
            signal.raise_signal(number)
        finally:
            raise error

    assert exit_status(run, interrupted="Stopped.") == 128 + number
    assert capsys.readouterr().err == "Stopped.\n"


# What is tested is that a forked process does not end as the one that it is forked from.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked on Windows")
@pytest.mark.parametrize("prepare", [None, end_at_once_on_termination])
def test_what_sigterm_ends_at_once(prepare, capfd):
    """A worker that was forked, and a process that waits for others in code that is not Python's."""

    def run():
        if not (pid := os.fork()):
            try:
                if prepare:
                    interruption._process = os.getpid()
                    prepare()
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM

    assert exit_status(run) == 0
    assert capfd.readouterr().err == ""


@BOTH
def test_code_that_hears_no_signals_is_not_waited_for(number, name):
    """As the training of a tokenizer: Python's handlers do not run before it returns."""
    code = (
        "import hashlib, os, threading; from litgpt_moe_ext.errors import exit_status\n"
        "from litgpt_moe_ext.interruption import ending_at_once\n"
        "def run():\n"
        "    with ending_at_once():\n"
        "        pass\n"
        "    with ending_at_once():\n"
        f"        threading.Timer(0.2, os.kill, (os.getpid(), {int(number)})).start()\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "exit_status(run)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stderr) == (128 + number, f"Stopped by {name}.\n")


@pytest.mark.parametrize("program", ["run_train.py", *(f"data_prep/{script.name}" for script in SCRIPTS)])
def test_what_a_program_imports_before_ctrl_c_is_one_line(program):
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])\n"
        "assert not {'jsonargparse', 'numpy', 'tokenizers', 'torch', 'yaml'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, ROOT / program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"], ids=["usually", "on Windows"])
def test_what_an_encoding_lacks_is_a_question_mark(monkeypatch, tmp_path, errors):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1", errors=errors))
    name = os.fsdecode(b"\xff")
    assert exit_status(lambda: print("größer \N{GREATER-THAN OR EQUAL TO}", name)) == 0
    assert shown.getvalue() == "größer ? ?\n".encode("latin-1")
    assert sys.stdout.errors == errors, "as it was"
    write_text(tmp_path / "report.html", name)
    assert (tmp_path / "report.html").read_text() == "?"


@pytest.mark.slow
def test_streams_may_be_closed(recipe, tmp_path):
    """As by `>&-`, or whatever starts a training as a service; nothing of the run goes where they were."""
    closed = 'exec "$@" <&- >&- 2>&-'
    for command in ((*RUN_TRAIN, "--config", recipe(train={"max_tokens": 2 * 128})), (*MODEL_CARD, recipe("card"))):
        run_command("bash", "-c", closed, "bash", *command)
    checkpoint = tmp_path / "out" / "final"
    run_command("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=checkpoint)
    assert "step 2/2 |" in (tmp_path / "out" / "train.log").read_text()


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_one_line(capsys):
    assert exit_status(lambda: Path("/dev/full").write_text("x")) == CANNOT
    assert capsys.readouterr().err == "error: No space left on device; free some space and run the same command again\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_file_without_permission_is_one_line(number, capsys):
    """As in a folder of another user, of which a path that was given has a part."""

    def read(name: str | None = None) -> int:
        raise OSError(number, os.strerror(number), name)

    assert exit_status(lambda: read("there/file")) == WRONG_SETTING
    assert capsys.readouterr().err == (
        f"error: there/file: {os.strerror(number)}; have its owner make it readable, or writable, for you, or name "
        "another path\n"
    )
    with pytest.raises(OSError, match=os.strerror(number)):  # which has no name, and may be anything
        exit_status(read)


@BOTH
def test_no_signal_comes_between_a_pool_and_the_process_that_it_starts(number, name, monkeypatch, capsys):
    """That process would say what it lacks when its parent is gone."""
    started = []

    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, _function, lists):
            signal.raise_signal(number)
            started.append(lists)
            return SimpleNamespace(result=lambda: lists)

        def shutdown(self, cancel_futures):
            pass

    def run():
        for _ in encoding.encode_in_order(None, [Batch()], 2):
            wait()
            started.append("went on")

    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(encoding, "_context", lambda: None)
    assert exit_status(run) == 128 + number
    assert started == [([], [])]
    assert capsys.readouterr().err == f"Stopped by {name}.\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's /proc says which signals another process blocks")
def test_processes_that_encode_do_not_hear_ctrl_c():
    code = (
        "from multiprocessing import forkserver; from litgpt_moe_ext.data.pipeline.encoding import _context\n"
        "if __name__ == '__main__':\n"
        "    _context(); print(open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read())\n"
        "    print(open('/proc/self/status').read())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    masks = [int(line.split()[1], 16) for line in result.stdout.splitlines() if line.startswith("SigBlk")]
    assert [bool(mask & 1 << signal.SIGINT - 1) for mask in masks] == [True, False], result.stderr
