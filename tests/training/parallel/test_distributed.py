"""Two and four real processes over gloo: the same training as one, under every strategy that runs on CPUs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import litgpt.pretrain
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from safetensors.torch import load_file

from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.data.loader import Replica, TokenLoader
from litgpt_moe_ext.data.windows import StreamWindows
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.training.checkpoint.resharding import convert_position, inexact_note
from litgpt_moe_ext.training.parallel.facts import STRATEGIES
from litgpt_moe_ext.training.parallel.processes import cluster_plugins, started_by_fabric, started_processes
from litgpt_moe_ext.training.parallel.strategies import make_strategy
from litgpt_moe_ext.training.phases.start import sequences_and_steps_ahead
from litgpt_moe_ext.training.settings import DistributedArgs, StrategyName
from tests.runs import PATIENCE, ROOT, RUN_TRAIN, logged, run_command, train, weights_of
from tests.training.processes import Training, free_port, train_in_ranks

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--nnodes=1"]


def assert_same_training(ours: Path, theirs: Path) -> None:
    for column in ("loss", "val_loss"):
        first, second = ({k: float(v) for k, v in logged(d, column).items()} for d in (ours, theirs))
        assert list(first) == list(second)
        assert first == pytest.approx(second, abs=2e-3)
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    expected = weights_of(theirs / "final")
    for name, weight in weights_of(ours / "final").items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(weight, expected[name]), name
        else:
            torch.testing.assert_close(weight, expected[name], atol=5e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_two_processes_train_as_one_and_hand_over(recipe, tmp_path, capsys, strategy):
    """Two processes equal one; a checkpoint of two is resumed by one and by four, and one of one by two."""
    tokens = {"max_tokens": 6 * 128, "global_batch_size": 4, "save_interval": 3}
    extras = {"ema": {"decay": 0.5}, "eval": {"interval": 3, "max_iters": 2}}

    def file(name: str, processes: int) -> Path:
        train = {**tokens, "micro_batch_size": 4 // processes}
        out_dir = str(tmp_path / name)
        return recipe(name, out_dir=out_dir, train=train, devices=processes, strategy=strategy, **extras)

    assert main(["--config", str(file("one", 1))]) == 0
    train_in_ranks(2, "--config", file("two", 2))
    assert_same_training(tmp_path / "two", tmp_path / "one")
    average, expected = (weights_of(tmp_path / name / "final" / "ema") for name in ("two", "one"))
    assert all(torch.allclose(average[name], expected[name], atol=5e-3) for name in expected)
    export(tmp_path / "two" / "final" / "ema", tmp_path / "exported", "hf")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], average["lm_head.weight"])
    for source, name, processes in (("two", "two-one", 1), ("two", "two-four", 4), ("one", "one-two", 2)):
        start = tmp_path / source / "step-00000003"
        arguments = ["--config", str(file(name, processes)), "--resume", str(start)]
        if processes == 1:
            assert main(arguments) == 0
            output = capsys.readouterr().out
        else:
            output = train_in_ranks(processes, *arguments)
        assert "they start anew" in output
        for column in ("loss", "val_loss"):
            ours, theirs = ({k: float(v) for k, v in logged(tmp_path / n, column).items()} for n in (name, "one"))
            assert ours == pytest.approx({k: v for k, v in theirs.items() if k > 3 or k not in theirs}, abs=2e-3)
        assert (tmp_path / name / "final" / "ema" / "lit_model.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_shards_go_on_from_a_checkpoint_of_a_fused_optimizer(recipe, tmp_path, momentum):
    """One process steps by torch's fused SGD, which shards cannot; without momentum there is no state."""
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": momentum}}
    tokens = {"max_tokens": 9 * 128, "global_batch_size": 4, "save_interval": 3}

    def file(name: str, processes: int) -> Path:
        train, strategy = {**tokens, "micro_batch_size": 4 // processes}, "fsdp2" if processes > 1 else "auto"
        out_dir = str(tmp_path / name)
        return recipe(name, out_dir=out_dir, train=train, devices=processes, strategy=strategy, optimizer=sgd)

    assert main(["--config", str(file("one", 1))]) == 0
    train_in_ranks(2, "--config", file("two", 2), "--resume", tmp_path / "one" / "step-00000003")
    assert main(["--config", str(file("back", 1)), "--resume", str(tmp_path / "two" / "step-00000006")]) == 0
    expected = weights_of(tmp_path / "one" / "final")
    for name in ("two", "back"):
        weights = weights_of(tmp_path / name / "final")
        assert all(torch.allclose(weights[key], expected[key], atol=1e-5) for key in expected), name


@pytest.mark.slow
def test_launchers(recipe, tmp_path):
    """Processes of torchrun, of SLURM and of hand-set variables give the run of `devices: 2`. One of them speaks."""
    train = {"max_tokens": 2 * 128, "micro_batch_size": 2}

    def file(name: str, devices: int | str) -> Path:
        return recipe(name, out_dir=str(tmp_path / name), train=train, devices=devices)

    torchrun = [*TORCHRUN, "--nproc_per_node=2", f"--master_port={free_port()}", RUN_TRAIN[1]]
    for command, given in ((RUN_TRAIN, file("own", 2)), (torchrun, file("torchrun", "auto"))):
        output = run_command(*command, "--config", given).stdout
        assert output.count("step 2/2 |") == output.count(f"saved {tmp_path / given.stem / 'final'}") == 1
    train_in_ranks(2, "--config", file("by_hand", "auto"))
    started, port = {}, str(free_port())
    for rank in ("0", "1"):
        slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        slurm["SLURM_STEP_ID"] = "0"
        place = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, environment, nodes in (("slurm", {**slurm, "SLURM_NODEID": "0"}, 1), ("two_nodes", place, 2)):
            arguments = ("--config", file(name, "auto"), f"--num_nodes={nodes}")
            started[name, rank] = Training(*arguments, environment=environment)
    for process in started.values():
        output, _ = process.communicate()
        assert process.returncode == 0, output
    for name in ("torchrun", "by_hand", "slurm", "two_nodes"):
        assert logged(tmp_path / name, "loss") == logged(tmp_path / "own", "loss")


@pytest.mark.parametrize("where", ["a notebook", "a program that is no file"])
def test_processes_that_nobody_can_start(recipe, monkeypatch, capsys, where):
    """They would be started as this one was, which is no command line."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["-c"])
    if where == "a notebook":
        monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    assert main(["--config", str(recipe(devices=2))]) == 2
    assert f"error: devices: 2 processes cannot be started from {where}" in capsys.readouterr().err


@contextlib.contextmanager
def none_left(launcher: subprocess.Popen) -> Iterator[list[int]]:
    """Yield a list for the ids of its children; at the end of the scope all of them are killed, whatever happened."""
    children = []
    with launcher:
        try:
            yield children
        finally:
            for pid in (launcher.pid, *children):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


def await_child(launcher: subprocess.Popen) -> int:
    """Return the id of the first child as soon as there is one."""
    while not (children := children_of(launcher.pid)):
        assert launcher.poll() is None
        time.sleep(0.1)
    return children[0]


def children_of(pid: int) -> list[int]:
    output = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


def wait_until_gone(pids: list[int]) -> list[int]:
    """Return which processes do not end by themselves; one that waits for another takes ten minutes to give up."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.2)
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "stopped"), [("first", False), ("second", False), ("first", True)])
def test_one_of_two_dies(recipe, victim, stopped):
    """The other one ends with an error, and nothing is left running, not even a second that was stopped."""
    file = recipe(train={"max_tokens": 10_000 * 128, "save_interval": 10_000}, eval={"interval": 10_000}, devices=2)
    first = subprocess.Popen(
        [*RUN_TRAIN, "--config", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    with none_left(first) as second:
        assert any(line.startswith("step 3/") for line in first.stdout)
        second += children_of(first.pid)
        assert second
        if stopped:
            os.kill(second[0], signal.SIGSTOP)
        os.kill(first.pid if victim == "first" else second[0], signal.SIGKILL)
        output, _ = first.communicate(timeout=300)
        assert first.returncode not in (0, None), output
        if victim == "second":
            assert f"Stopped: rank 1 (process {second[0]}) was ended by SIGKILL" in output
            assert "Traceback" not in output
        assert wait_until_gone(second) == []


@pytest.mark.slow
def test_torchrun_is_killed(recipe):
    """It cannot end its processes then; they end by themselves."""
    file = recipe(
        train={"max_tokens": 1_000_000 * 128, "save_interval": 1_000_000}, eval={"interval": 1_000_000}, devices="auto"
    )
    torchrun = [*TORCHRUN, "--nproc_per_node=2", f"--master_port={free_port()}", RUN_TRAIN[1], "--config", str(file)]
    launcher = subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    with none_left(launcher) as workers:
        assert any(line.startswith("step 3/") for line in launcher.stdout)
        workers += children_of(launcher.pid)
        assert len(workers) == 2
        launcher.kill()
        assert wait_until_gone(workers) == []


@pytest.mark.slow
def test_first_dies_before_the_processes_connect(recipe):
    """The second is still importing when its parent is killed; it ends instead of waiting for ten minutes."""
    first = subprocess.Popen([*RUN_TRAIN, "--config", str(recipe(devices=2))], stdout=subprocess.DEVNULL, cwd=ROOT)
    with none_left(first) as second:
        second.append(await_child(first))
        first.kill()
        first.wait()
        assert wait_until_gone(second) == []


@pytest.mark.slow
def test_ctrl_c_before_the_processes_connect(recipe):
    """The first one waits in native code for the second, which is still importing."""
    first = subprocess.Popen(
        [*RUN_TRAIN, "--config", str(recipe(devices=2))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    with none_left(first) as second:
        second.append(await_child(first))
        os.kill(second[0], signal.SIGSTOP)
        assert any(line.startswith("Initializing distributed: GLOBAL_RANK: 0") for line in first.stdout)
        time.sleep(1)  # the line comes just before
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=300) == 130
        os.kill(second[0], signal.SIGCONT)
        assert wait_until_gone(second) == []
        assert "Stopped at once; --resume auto continues" in first.communicate()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_process_whose_parent_is_gone_before_it_looks_ends():
    """As one that a study had just started when it was killed; it would train beside the study that goes on."""
    code = (
        "import os, time; from litgpt_moe_ext.training.parallel.processes import die_with_parent\n"
        "parent = os.getpid()\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "while os.getppid() == parent:\n"
        "    time.sleep(0.01)\n"
        "die_with_parent(parent)\n"
        "print('went on')"
    )
    assert run_command(sys.executable, "-c", code).stdout == ""


@pytest.mark.slow
def test_data_that_are_refused_are_a_line_and_no_traceback(recipe, tmp_path):
    """The second process prepares them after the first, and once waited for it when that had gone."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "text.jsonl").write_text('{"content": "text"}')
    files = {"source_path": str(source), "pattern": "*.jsonl", "bpe": {"vocab_size": 300}, "data_path": str(tmp_path)}
    data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": files}
    process = subprocess.run(
        [*RUN_TRAIN, "--config", str(recipe(data=None, devices=2)), f"--data={json.dumps(data)}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert process.returncode == 2, process.stderr
    assert "text.jsonl has no field 'text'" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_alone_with_the_variables_of_two(recipe):
    """Nobody answers: an error after distributed.timeout_minutes that names the address, and no traceback."""
    port = str(free_port())
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = subprocess.run(
        [*RUN_TRAIN, "--config", str(recipe()), "--devices=auto", "--distributed.timeout_minutes=0.05"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={**os.environ, **place},
    )
    assert process.returncode == 2
    message = f"could not be connected through 127.0.0.1:{port} within 0.05 minutes (distributed.timeout_minutes)"
    assert message in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_port_that_is_taken(recipe):
    """As by a second run in the same allocation; it ends at once, and names the setting."""
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = Training("--config", recipe(), "--devices=auto", environment=place)
        output, _ = process.communicate()
    assert process.returncode == 2
    assert f"error: environment: MASTER_PORT: {port} is taken, by another program or by a second process" in output


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 128 + signal.SIGUSR1)])
def test_a_signal_to_one_of_two(recipe, tmp_path, name, status):
    """Both finish the step; the run has one message, a checkpoint, and the exit status of the signal."""
    file = recipe(train={"max_tokens": 10_000 * 128, "save_interval": 10_000}, eval={"interval": 10_000}, devices=2)
    first = subprocess.Popen(
        [*RUN_TRAIN, "--config", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    for line in first.stdout:
        if line.startswith("step 3/"):
            break
    (second,) = children_of(first.pid)
    os.kill(second if name == "SIGTERM" else first.pid, getattr(signal, name))
    output, _ = first.communicate(timeout=300)
    assert first.returncode == status, output
    assert wait_until_gone([second]) == []
    assert output.count(f"Stopped by {name}, saved as {tmp_path / 'out' / 'step-0'}") == 1
    assert len(list((tmp_path / "out").glob("step-*"))) == 1


@pytest.mark.parametrize(
    ("ends", "status"), [("of itself", 0), ("by a signal", 143), ("by a setting", 2), ("by an error", None)]
)
def test_the_process_group_is_destroyed(recipe, monkeypatch, ends, status):
    """Else the next training in this process would join it, and NCCL's threads would outlive the run."""
    validate = litgpt.pretrain.validate

    def end(*args, **kwargs):
        if not torch.distributed.is_initialized():  # a single process has no group of its own
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        if ends == "by a signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif ends == "by a setting":
            raise SettingsError("wrong")
        elif ends == "by an error":
            raise RuntimeError("wrong")
        return validate(*args, **kwargs)

    monkeypatch.setattr(litgpt.pretrain, "validate", end)
    with contextlib.nullcontext() if status is not None else pytest.raises(RuntimeError, match="wrong"):
        assert train("--config", recipe(train={"max_tokens": 2 * 128})) == status
    assert not torch.distributed.is_initialized()


class TestStartedProcesses:
    HAND = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}

    def test_none(self):
        assert started_processes({}) is None
        assert started_processes({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}) is None, "as Fabric starts its own"
        assert started_processes({"WORLD_SIZE": "1"}) is None

    def test_torchrun(self):
        environment = {**self.HAND, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
        assert started_processes(environment) == ("torchrun", 2, 2)

    def test_by_hand(self):
        name = "the environment (RANK, WORLD_SIZE)"
        assert started_processes(self.HAND) == (name, 4, 1)
        assert started_processes({**self.HAND, "LOCAL_WORLD_SIZE": "2"}) == (name, 2, 2)
        assert started_processes(self.HAND, num_nodes=2) == (name, 2, 2)

    def test_slurm(self):
        job = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}
        task = {**job, "SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}
        assert started_processes(task) == ("SLURM", 4, 2)
        # `srun --nodes=1 --ntasks=2` in a job of two nodes, which keeps what the job was asked for
        step = {**task, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        assert started_processes({**step, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}) == ("SLURM", 2, 1)
        for name in ("bash", "interactive"):  # srun --pty, salloc
            assert started_processes({**job, "SLURM_JOB_NAME": name}) is None, "an interactive shell starts nothing"
        with pytest.raises(SettingsError, match="SLURM_NTASKS: 3 is not a multiple of SLURM_NNODES: 2"):
            started_processes({**task, "SLURM_NTASKS": "3"})
        with pytest.raises(SettingsError, match="SLURM_NTASKS: 8 without SLURM_NTASKS_PER_NODE; .*-per-node=4"):
            started_processes({name: value for name, value in task.items() if name != "SLURM_NTASKS_PER_NODE"})

    def test_slurm_without_srun(self):
        """In a batch script, which has the variables of the first task; it once waited for the others."""
        job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"}
        script = {**job, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        with pytest.raises(SettingsError, match=r"SLURM_NTASKS: 2 without SLURM_STEP_ID: srun .* write srun in"):
            started_processes(script)
        with pytest.raises(SettingsError, match="without SLURM_LOCALID, SLURM_PROCID, SLURM_STEP_ID: srun has not"):
            started_processes(job)  # an allocation that has a name
        assert started_processes({**script, "SLURM_NTASKS": "1"}) == ("SLURM", 1, 1)

    @pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "²", "too small or too large"])
    @pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"])
    def test_values_that_are_no_numbers(self, name, value):
        """A rank that does not exist would keep the others waiting for the one that is missing."""
        slurm = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        slurm["SLURM_STEP_ID"] = "0"
        environment = slurm if name.startswith("SLURM") else self.HAND
        if value == "too small or too large":
            value = "0" if "SIZE" in name else "4"
        with pytest.raises(SettingsError, match=f"environment: {name}: '?{value}'? must be "):
            started_processes({**environment, name: value})

    @pytest.mark.parametrize("port", ["0", "", "-1", "65536", "http"])
    def test_no_port(self, port):
        """`torchrun --master_port 0` sets 0, where the processes would wait for each other for ever."""
        with pytest.raises(ValueError, match=f"MASTER_PORT: '{port}' is not a port .* --standalone"):
            started_processes({**self.HAND, "MASTER_PORT": port})
        assert started_processes({**self.HAND, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port})

    def test_who_tells_fabric_of_the_processes(self):
        """It finds torchrun's and SLURM's by itself, and would start its own beside those of variables set by hand."""
        assert [type(plugin) for plugin in cluster_plugins(started_processes(self.HAND))] == [TorchElasticEnvironment]
        assert cluster_plugins(started_processes({**self.HAND, "TORCHELASTIC_RUN_ID": "1"})) == []
        assert cluster_plugins(None) == []

    def test_who_looks_after_a_process(self, monkeypatch):
        """Torchrun after its own ones, also where a run before has left its number in the environment."""
        monkeypatch.setenv("LITGPT_MOE_EXT_LAUNCHER_PID", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.delenv("RANK", raising=False)
        assert started_by_fabric()
        monkeypatch.setenv("RANK", "1")
        assert not started_by_fabric()

    def test_contradictions(self):
        with pytest.raises(ValueError, match="MASTER_PORT"):
            started_processes({name: value for name, value in self.HAND.items() if name != "MASTER_PORT"})
        with pytest.raises(
            ValueError, match="environment: WORLD_SIZE set but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK"
        ):
            started_processes({"WORLD_SIZE": "2"})
        with pytest.raises(ValueError, match="WORLD_SIZE: 4 is not a multiple of LOCAL_WORLD_SIZE: 3"):
            started_processes({**self.HAND, "LOCAL_WORLD_SIZE": "3"})
        with pytest.raises(ValueError, match="WORLD_SIZE: 4 is not a multiple of num_nodes: 3"):
            started_processes(self.HAND, num_nodes=3)


class TestMakeStrategy:
    def make(self, name: str, accelerator: str = "cuda", nodes: int = 1, processes: int = 2, **knobs):
        return make_strategy(name, processes, nodes, DistributedArgs(**knobs), accelerator)

    def test_every_name_has_its_row(self):
        assert tuple(STRATEGIES) == get_args(StrategyName)
        knobs = {knob for row in STRATEGIES.values() for knob in row.options}
        assert knobs == {knob.name for knob in fields(DistributedArgs)} - {"timeout_minutes"}

    def test_who_holds_the_whole_model(self):
        assert [name for name, facts in STRATEGIES.items() if not facts.holds_whole_model(1)] == ["deepspeed_stage_3"]
        shards = ["fsdp", "fsdp_shard_grad_op", "fsdp2", "deepspeed_stage_3"]
        assert [name for name, facts in STRATEGIES.items() if not facts.holds_whole_model(2)] == shards

    def test_knobs_reach_fabric(self):
        assert self.make("ddp", bucket_mb=5)._options == {"bucket_cap_mb": 5}
        flags = {"gradient_as_bucket_view": True, "find_unused_parameters": False}
        assert self.make("auto", **flags)._options == flags
        assert self.make("auto", processes=1, accelerator="cpu").root_device == torch.device("cpu")
        assert self.make("fsdp2", processes=1).root_device == torch.device("cuda", 0)
        for name in ("ddp", "fsdp2"):
            assert self.make(name, timeout_minutes=2)._timeout.total_seconds() == 120

    @pytest.mark.parametrize("processes", [1, 2])
    def test_ranks_on_gpus_map_the_checkpoint_that_they_resume(self, processes):
        """Each would otherwise hold a copy of all of it in the memory of the machine."""
        assert self.make("ddp", processes=processes).checkpoint_io.mmap
        assert not self.make("ddp", "cpu", processes=processes).checkpoint_io.mmap

    def test_offloaded_shards_are_reduced_on_the_cpu(self):
        strategy = self.make("fsdp", cpu_offload=True)
        strategy.parallel_devices, strategy.cluster_environment = [torch.device("cuda", 0)], LightningEnvironment()
        assert strategy._get_process_group_backend() == "cpu:gloo,cuda:nccl"

    def test_nothing_is_offloaded_from_cpus(self):
        """Torch would lock pages, which needs a driver of GPUs."""
        assert not self.make("fsdp2", "cpu", cpu_offload=True)._args.cpu_offload

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "deepspeed_stage_1", "accelerator": "cpu"}, "strategy: 'deepspeed_stage_1' needs CUDA devices"),
            ({"name": "ddp", "cpu_offload": True}, "distributed.cpu_offload: True would be ignored"),
            ({"name": "fsdp2", "bucket_mb": 3}, "distributed.bucket_mb: 3.0 would be ignored"),
            ({"name": "dpp"}, "strategy: 'dpp' is unknown; choose from auto, ddp"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            self.make(**arguments)


class TestResharding:
    def state(self, position: int, batch_size: int, world_size: int) -> dict:
        fingerprint = {"batch_size": batch_size, "world_size": world_size, "seed": 1}
        return {"epoch": 2, "position": position, "fingerprint": fingerprint}

    def test_position(self):
        assert convert_position(self.state(6, 2, 2), 1, 4) == self.state(6, 1, 4)
        assert convert_position(self.state(6, 2, 2), 2, 1) == self.state(12, 2, 1)
        assert convert_position({"other": 1}, 2, 1) == {"other": 1}
        with pytest.raises(ValueError, match="makes batches of 8, but the checkpoint stopped after 12 sequences"):
            convert_position(self.state(6, 2, 1), 8, 1)

    @pytest.mark.parametrize(("batch_size", "world_size"), [(1, 2), (2, 1)])
    @pytest.mark.parametrize("several", [False, True])
    def test_position_of_litdata(self, several, batch_size, world_size):
        """Of its data set, or of each of a mixture."""
        one = {"num_samples_yielded": 4, "num_workers": 1, "batch_size": 1, "world_size": 1, "current_epoch": 1}
        state = {"dataset": {"0": {**one, "num_samples_yielded": 0}, "1": one} if several else one, "current_epoch": 1}
        assert convert_position(state, 1, 1) == state
        with pytest.raises(SettingsError, match="litdata can resume only with 1 on 1 process,"):
            convert_position(state, batch_size, world_size)
        one["num_samples_yielded"] = 0
        assert convert_position(state, batch_size, world_size) == state

    def test_epoch_of_litdata(self):
        """Its data sets, resumed by workers, say that they are in their first epoch."""
        one = {"num_samples_yielded": 4, "num_workers": 1, "batch_size": 1, "world_size": 1, "current_epoch": 1}
        for data in (one, {"0": one, "1": one}):
            found = convert_position({"dataset": data, "current_epoch": 3}, 1, 1)["dataset"]
            assert {part["current_epoch"] for part in ([found] if data is one else found.values())} == {3}

    def test_mixtures_of_litdata_are_restored_with_one_worker_only(self):
        def note(workers: int, batch_size: int = 2, parts: int = 2) -> str | None:
            one = {"num_samples_yielded": 4, "num_workers": workers, "batch_size": batch_size, "world_size": 1}
            return inexact_note({"dataset": one if parts == 1 else {str(part): one for part in range(parts)}})

        assert note(2).startswith("data.num_workers: 2: of a mixture litdata finds its place only with 0 or 1")
        assert [note(1), note(0), note(2, batch_size=1), note(2, parts=1), inexact_note({"epoch": 1})] == [None] * 5

    def test_position_at_the_end_of_an_epoch(self):
        """What a smaller batch has left of an epoch may be less than a larger one, which then begins the next."""
        windows = StreamWindows([np.arange(11 * 4 + 1)], 4)
        one, five = (TokenLoader(windows, size, True, replica=Replica(0, 1)) for size in (1, 5))
        batches = iter(one)
        for _ in range(10):
            next(batches)
        five.load_state_dict(convert_position(one.state_dict(), 5, 1))
        assert (five.epoch, five.state_dict()["position"]) == (1, 0)

    def test_steps(self, finished, tmp_path):
        checkpoint = finished(tmp_path / "out") / "final"
        assert sequences_and_steps_ahead(checkpoint, 16) == (48, 12 - 3)
