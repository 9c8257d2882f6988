"""Real training processes without the many seconds that each takes to import LitGPT: forks of a server that has it."""

import io
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.preloaded"])


# Whoever listens with SO_REUSEADDR, as servers do, may have a port to which a socket is bound that does not listen;
# nobody who asks for any port, or connects from any, gets it. The last of them are kept.
_held: deque[socket.socket] = deque(maxlen=32)


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens to, and that the machine gives nobody else."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return holder.getsockname()[1]


class Training:
    """`run_train.py` with some arguments, in a process and a session of its own; a part of what `subprocess.Popen` has.

    Args:
        *arguments: The command line.
        environment: More variables of the process.

    Attributes:
        stdout: Lines of its output and errors.
    """

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pipe, command_line = f"{folder}/output", [str(argument) for argument in arguments]
            os.mkfifo(pipe)
            self._process = CONTEXT.Process(target=_train, args=(pipe, command_line, environment or {}))
            self._process.start()
            self.pid = self._process.pid
            self.stdout = open(pipe, encoding="utf-8")  # noqa: SIM115  once the process has opened it, too

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

    def communicate(self) -> tuple[str, None]:
        """Read the rest of the output, and wait for the end."""
        with self.stdout:
            output = self.stdout.read()
        self._process.join()
        return output, None


def trained_in_ranks(ranks: int, *arguments: str | Path, **environment: str) -> tuple[list[str], list[int | None]]:
    """Train in processes whose variables are set as by a launcher, and return what they say and how they end.

    Args:
        ranks: Their number.
        *arguments: The command line.
        **environment: More variables of each process.
    """
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    processes = [
        Training(*arguments, "--devices=auto", environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    return outputs, [process.returncode for process in processes]


def train_in_ranks(ranks: int, *arguments: str | Path, **environment: str) -> str:
    """Train in ranks to the end, and return what the first one says; the arguments are those of `trained_in_ranks`."""
    outputs, statuses = trained_in_ranks(ranks, *arguments, **environment)
    assert statuses == [0] * ranks, "\n".join(outputs)
    return outputs[0]


def in_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Return what a function of a module returns on each of several ranks that are connected over gloo.

    Args:
        function: Called with `arguments`; what it returns must be plain data or tensors.
        ranks: Their number.
        *arguments: Of the function.
    """
    import torch

    results = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/store"
        processes = [
            CONTEXT.Process(target=_rank, args=(results, where, rank, ranks, function, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found = {}
        for _ in processes:
            rank, result = results.get()
            if isinstance(result, str):  # the others may wait for it
                for process in processes:
                    process.kill()
                raise AssertionError(result)
            found[rank] = result
        for process in processes:
            process.join()
    # As bytes, because a tensor in a queue needs the process that made it.
    return [torch.load(io.BytesIO(found[rank]), weights_only=True) for rank in range(ranks)]


def _rank(results: Any, where: str, rank: int, ranks: int, function: Callable[..., Any], arguments: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
        buffer = io.BytesIO()
        torch.save(function(*arguments), buffer)
        # A rank that ends closes its connections, also those of which another one does not know yet that they are made.
        if dist.is_initialized():  # training ends the group itself
            dist.barrier()
        results.put((rank, buffer.getvalue()))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(pipe: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    writer = os.open(pipe, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(writer)
    from litgpt_moe_ext.cli.train import main

    sys.exit(main(arguments))
