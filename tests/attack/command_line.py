"""Any value for any setting through the whole command line: each in a process of its own, which cannot hang for ever.

`python -m tests.attack.command_line --count 4000` tries more of them than a test may, and prints what came of them.
"""

import argparse
import collections
import dataclasses
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.attack.values import VALUES, fresh, sections
from tests.runs import corpus_in, recipe_writer
from tests.training.processes import CONTEXT

_CPU_SECONDS = 60  # a step takes one, and a machine may be slow
_NAMES = {0: "trained", 1: "ended with a reason", 2: "refused in one line"}
PLACES = ("a recipe", "a flag")


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        status: Its exit status, minus the number of the signal that ended it.
        error: What it wrote to standard error.
    """

    status: int
    error: str

    def check(self, what: Any) -> None:
        """Check that it trained, said in one line what is wrong, or said why training cannot go on.

        Args:
            what: Was tried.
        """
        assert self.status in (0, 1, 2), (what, self)
        assert "Traceback" not in self.error, (what, self)
        if self.status == 2:
            assert self.error.startswith("error: "), (what, self)
            assert self.error.count("\n") == 1, (what, self)


def settings_of_a_recipe() -> list[str]:
    """Return the names of all settings of all sections, and of those of the model, a corpus and an optimizer."""
    from litgpt.config import Config

    names = [section.name_of(field.name) for section in sections() for field in dataclasses.fields(section)]
    names += [f"model_config.{field.name}" for field in dataclasses.fields(Config)]
    names += [
        f"data.init_args.{name}" for name in ("data_path", "source_path", "vocab_size", "val_fraction", "workers")
    ]
    names += [f"optimizer.init_args.{name}" for name in ("lr", "betas", "eps", "weight_decay", "fused", "capturable")]
    return [name for name in names if name not in ("model_config.name", "out_dir")]


def as_flag(value: Any) -> str:
    """Return the text of a value on a command line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


class CommandLine:
    """Runs `run_train.py` with one setting changed, for one step.

    Args:
        file: A recipe that trains.
        out_dir: Of all runs.
    """

    def __init__(self, file: Path, out_dir: Path) -> None:
        self._content = yaml.safe_load(file.read_text())
        self._content["train"]["max_steps"] = self._content["eval"]["max_iters"] = 1
        self._file, self._out_dir = file, out_dir
        self._connection, theirs = CONTEXT.Pipe()
        self._server = CONTEXT.Process(target=_serve, args=(theirs,))
        self._server.start()
        theirs.close()

    def __enter__(self) -> "CommandLine":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._server.join()

    def outcome(self, name: str, value: Any, place: str) -> Outcome:
        """Return what comes of a setting.

        Args:
            name: The setting.
            value: For it.
            place: One of `PLACES`.
        """
        content, flags = fresh(self._content), []
        if place == "a flag":
            flags = [f"--{name.replace('.init_args', '')}={as_flag(value)}"]
        else:
            *parents, last = name.split(".")
            node = content
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = fresh(value)
        self._file.write_text(yaml.safe_dump(content))
        shutil.rmtree(self._out_dir, ignore_errors=True)
        self._connection.send(["--config", str(self._file), *flags])
        return self._connection.recv()


def _serve(connection: Any) -> None:
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            if not (pid := os.fork()):
                resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
                signal.alarm(10 * _CPU_SECONDS)
                os.chdir(Path(arguments[1]).parent)  # where a wrong path is made
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                warnings.simplefilter("ignore")  # which LitGPT writes between our lines
                status = 1
                try:
                    from litgpt_moe_ext.cli.train import main

                    status = main(arguments)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            errors.seek(0)
            connection.send(Outcome(status, errors.read().decode(errors="replace")))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="settings whose names begin so")
    given = parser.parse_args()
    tried = [
        (name, value, place)
        for name in settings_of_a_recipe()
        for value in VALUES
        for place in PLACES
        if name.startswith(given.only)
    ]
    random.Random(given.seed).shuffle(tried)
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.monotonic()
        with CommandLine(recipe_writer(folder, corpus_in(folder))(), folder / "out") as command:
            for number, what in enumerate(tried[: given.count], 1):
                outcome = command.outcome(*what)
                tally[_NAMES.get(outcome.status, "fault")] += 1
                try:
                    outcome.check(what)
                except AssertionError as error:
                    print("FAULT", error, flush=True)
                if number % 50 == 0 or number == min(given.count, len(tried)):
                    print(f"{number} of {len(tried)}: {dict(tally)}, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    _main()
