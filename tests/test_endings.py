"""How commands end that Ctrl-C or a full disk stops."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litgpt_moe_ext.errors import CANNOT, INTERRUPTED, SettingsError, exit_status


class ExtensionFileLoader:
    """Loads as Python's does an extension module that drops what its imports raise."""

    loaded = False

    def create_module(self):
        try:
            signal.raise_signal(signal.SIGINT)
            self.loaded = True
        except KeyboardInterrupt:
            pass


def test_an_extension_module_is_loaded_before_ctrl_c_counts(capsys):
    loader, went_on = ExtensionFileLoader(), []

    def run():
        loader.create_module()
        time.sleep(5)
        went_on.append(True)

    assert exit_status(run) == INTERRUPTED
    assert loader.loaded
    assert not went_on
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


@pytest.mark.parametrize("error", [RuntimeError("a worker is gone"), SettingsError("x: 1 must be 2")])
def test_what_comes_of_ctrl_c_is_no_error(error, capsys):
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise error

    assert exit_status(run, interrupted="Stopped.") == INTERRUPTED
    assert capsys.readouterr().err == "Stopped.\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_one_line(capsys):
    assert exit_status(lambda: Path("/dev/full").write_text("x")) == CANNOT
    assert capsys.readouterr().err == "error: No space left on device; free some space, and run the same again\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's /proc says which signals another process blocks")
def test_processes_that_encode_do_not_hear_ctrl_c():
    code = (
        "from multiprocessing import forkserver; from litgpt_moe_ext.data.pipeline.encoding import _context\n"
        "if __name__ == '__main__':\n"
        "    _context(); print(open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read())\n"
        "    print(open('/proc/self/status').read())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    masks = [int(line.split()[1], 16) for line in result.stdout.splitlines() if line.startswith("SigBlk")]
    assert [bool(mask & 1 << signal.SIGINT - 1) for mask in masks] == [True, False], result.stderr
