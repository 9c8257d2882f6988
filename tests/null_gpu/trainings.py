"""Training processes on the null GPU that computes, without the many seconds that each takes to import LitGPT.

A process that has the GPU imports everything, and forks for every training. `python -m tests.null_gpu.trainings` is it.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from tests import null_gpu
from tests.runs import ROOT


class TrainingsOnGpu:
    """Trains on the null GPU, a process at a time.

    Args:
        library: What `null_gpu.build` returned.
    """

    def __init__(self, library: Path) -> None:
        of_gpu = null_gpu.environment(library, 89) | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.null_gpu.trainings"]
        self._server = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **of_gpu}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> "TrainingsOnGpu":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()

    def train(self, output: Path, *arguments: str | Path) -> str:
        """Train to the end, and return what is said.

        Args:
            output: File for that.
            *arguments: The command line.
        """
        print(json.dumps([str(output), *map(str, arguments)]), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        said = output.read_text()
        assert status == 0, said
        return said


def _serve() -> None:
    importlib.import_module("tests.training.preloaded")
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        if not (pid := os.fork()):
            _train(Path(output), arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _train(output: Path, arguments: list[str]) -> None:
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        importlib.import_module("tests.null_gpu.computing")
        from litgpt_moe_ext.cli.train import main

        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
