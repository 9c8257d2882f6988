"""A recipe small enough for tests: a corpus of a few files, a model of a few thousand parameters, a dozen steps."""

import contextlib
import csv
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
RUN_TRAIN = [sys.executable, str(ROOT / "run_train.py")]
PATIENCE = 900
"""Seconds for what takes some on an idle machine: only what hangs takes as long, however busy the machine is."""

FILES = ("argparse", "ast", "calendar", "cmd", "code", "copy", "csv", "enum", "heapq", "shlex", "string", "textwrap")


@pytest.fixture(scope="session")
def corpus_settings(tmp_path_factory) -> dict:
    """Arguments of a `PythonStdlib` over a few files, prepared once for all tests."""
    return corpus_in(tmp_path_factory.mktemp("corpus"))


def corpus_in(folder: Path) -> dict:
    """Return arguments of a `PythonStdlib` over a few files, which are copied into a folder."""
    source = folder / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", source)
    return {"data_path": str(folder / "prepared"), "source_path": str(source), "vocab_size": 300, "val_fraction": 0.2}


@pytest.fixture
def recipe(tmp_path, corpus_settings) -> Callable[..., Path]:
    """Write a recipe and return its path; `recipe(train={"max_tokens": 640}, ...)` changes sections."""
    return recipe_writer(tmp_path, corpus_settings)


def recipe_writer(folder: Path, corpus_settings: dict) -> Callable[..., Path]:
    """Return a function that writes recipes into a folder."""

    def write(name: str = "recipe", **changes) -> Path:
        content = {
            "out_dir": str(folder / "out"),
            "model_config": {
                "name": "tiny",
                "block_size": 32,
                "n_layer": 2,
                "n_embd": 16,
                "n_head": 4,
                "n_query_groups": 2,
                "vocab_size": 300,
                "padded_vocab_size": 304,
                "norm_class_name": "RMSNorm",
                "bias": False,
                "parallel_residual": False,
                "rotary_percentage": 1.0,
                "attention_class_name": "SinkAttention",
                "mlp_class_name": "SharedExpertMoE",
                "n_expert": 8,
                "n_expert_per_token": 2,
                "n_shared_expert": 1,
                "moe_intermediate_size": 8,
                "norm_topk_prob": True,
                "router_bias_update_rate": 0.01,
            },
            "data": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": dict(corpus_settings)},
            "train": {
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "max_tokens": 12 * 4 * 32,
                "lr_warmup_steps": 2,
                "max_norm": 1.0,
                "save_interval": 4,
                "log_interval": 1,
            },
            "eval": {"interval": 4, "max_iters": 2},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            "devices": 1,
        }
        for section, values in changes.items():
            if isinstance(values, dict) and isinstance(content.get(section), dict):
                content[section] = {**content[section], **values}
                content[section] = {key: value for key, value in content[section].items() if value is not None}
            else:
                content[section] = values
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def run_command(
    *command: str | Path,
    cwd: Path = ROOT,
    stdin: str = "",
    timeout: float | None = PATIENCE,
    status: int = 0,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with `status`, with `environment` beside the variables of this process."""
    ended = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, input=stdin, timeout=timeout,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == status, ended.stdout[-6000:] + ended.stderr[-3000:]
    return ended


def tool(name: str) -> ModuleType:
    """Return a script of `tools/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(*arguments: str | Path) -> int:
    """Run training in this process with a command line, and return the exit status."""
    from litgpt_moe_ext.cli.train import main

    return main([str(argument) for argument in arguments])


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file be larger than so many bytes: writing fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    # Python 3.11 would keep the half that it has written of what a module compiles to, and fail at the next import.
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        sys.dont_write_bytecode = before[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return how training says that a setting is wrong."""
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint of a run."""
    return torch.load(checkpoint / "lit_model.pth", map_location="cpu", weights_only=True)["model"]


def logged(out_dir: Path, column: str) -> dict[int, str]:
    """Return a column of a run's wide table by step, as written (so that equality is bit for bit)."""
    file = out_dir / "metrics-wide.csv"
    if not file.is_file():
        return {}
    with open(file, newline="") as handle:
        return {int(row["step"]): row[column] for row in csv.DictReader(handle) if row.get(column)}


def validation_fell_by(least: float, out_dir: Path) -> bool:
    """Return whether the loss fell between the first and the last validation, on the same tokens.

    That of training is of other tokens in every step, whose loss differs by more than a short run learns.
    """
    first, *_, last = map(float, logged(out_dir, "val_loss").values())
    return last < first - least


@pytest.fixture(scope="session")
def _whole_run(tmp_path_factory, corpus_settings) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train("--config", recipe_writer(folder, corpus_settings)()) == 0
    return folder / "out"


@pytest.fixture
def finished(_whole_run) -> Callable[..., Path]:
    """Put what a run of the recipe as it is leaves into `finished(out_dir)`: trained once for all tests.

    `finished(out_dir, step=4)` keeps no checkpoint but that of a step, as if the run had been killed after it.
    """

    def copy(out_dir: Path, step: int | None = None) -> Path:
        copies: dict[int, str] = {}

        def copy_or_link(source: str, target: str) -> None:
            """Keep two names of one file, as `best` has them, what they are."""
            number = os.stat(source).st_ino
            if number in copies:
                os.link(copies[number], target)
            else:
                copies[number] = shutil.copy2(source, target)

        shutil.copytree(_whole_run, out_dir, copy_function=copy_or_link, dirs_exist_ok=True)
        if step is not None:
            for checkpoint in ("best", "final", *(path.name for path in out_dir.glob("step-*"))):
                if checkpoint != f"step-{step:08d}":
                    shutil.rmtree(out_dir / checkpoint)
        return out_dir

    return copy
