"""Real training processes without the many seconds that each takes to import LitGPT: forks of a server that has it."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["litgpt.pretrain", "litgpt_moe_ext.training.run", "litgpt_moe_ext.data.modules.corpus"]
)


class Training:
    """`run_train.py` with some arguments, in a process and a session of its own; a part of what `subprocess.Popen` has.

    Attributes:
        stdout: Lines of its output and errors.
    """

    def __init__(self, *arguments: str | Path) -> None:
        pipe = Path(tempfile.mkdtemp()) / "output"
        os.mkfifo(pipe)
        self._process = _CONTEXT.Process(target=_train, args=(str(pipe), [str(a) for a in arguments]))
        self._process.start()
        self.pid = self._process.pid
        self.stdout = open(pipe, encoding="utf-8")  # noqa: SIM115

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the number of the signal that ended the process, or None."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, or None."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Read the rest of the output, and wait for the end."""
        with self.stdout:
            output = self.stdout.read()
        self._process.join(timeout)
        return output, None


def _train(pipe: str, arguments: list[str]) -> None:
    os.setsid()
    writer = os.open(pipe, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(writer)
    from litgpt_moe_ext.cli.train import main

    sys.exit(main(arguments))
