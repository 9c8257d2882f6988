"""What a run says when another of its processes is gone."""

import fnmatch
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.parallel import peers
from litgpt_moe_ext.training.phases import launch

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "
TYPICALLY = ". This is typically caused by a remote worker hanging or bugs in the application."


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """A run of two processes whose other one is on another machine."""

    def gather(everyone, own):
        everyone[:] = [own, peers.Peer(1, "elsewhere", 1)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    settings = SimpleNamespace(distributed=SimpleNamespace(timeout_minutes=7.0))
    return SimpleNamespace(
        fabric=SimpleNamespace(world_size=2, global_rank=0),
        plan=SimpleNamespace(out_dir=tmp_path, settings=settings),
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            f"{GLOO}Read error [10.0.0.2]:59275: Connection reset by peer{TYPICALLY}",
            "the connection to another process is lost (*Connection reset by peer); see its output",
        ),
        (
            f"{GLOO}Connection closed by peer [10.0.0.2]:1{TYPICALLY}",
            "*lost (*closed by peer [10.0.0.2]:1)*",
        ),
        (f"{GLOO}writev [10.0.0.2]:1: Broken pipe", "*lost (*Broken pipe)*"),
        ("NCCL error\nncclRemoteError: A call failed possibly due to a network error", "*lost (*network error)*"),
        ("sendBytes failed on SocketImpl(fd=69): Connection reset by peer", "*lost (*"),
        (torch.distributed.DistStoreError("wait timeout after 420000ms, keys: /0"), "*not answered for 7 minutes*"),
        (torch.distributed.DistNetworkError("Broken pipe"), "*lost (Broken pipe)*"),  # of the store, for a new group
        (f"{GLOO}Timed out waiting 420000ms for recv operation", "*not answered for 7 minutes (distributed.timeout*"),
    ],
)
def test_a_broken_connection(launched, tmp_path, error, said):
    for checkpoint in ("", "step-00000004"):
        if checkpoint:
            (tmp_path / checkpoint).mkdir()
            (tmp_path / checkpoint / "lit_model.pth").touch()
        with pytest.raises(TrainingStopped) as stopped, peers.explaining_lost_peers(launched):
            raise error if isinstance(error, RuntimeError) else RuntimeError(error)
        problem, _, remedy = str(stopped.value).rpartition(". The")
        pattern = said.replace("[", "[[]")
        assert fnmatch.fnmatchcase(problem, pattern), problem
        expected = f" newest checkpoint is {tmp_path / checkpoint}; --resume auto continues."
        assert remedy == (expected if checkpoint else "re is no checkpoint to continue from yet.")


def test_a_connection_that_breaks_at_once(launched, monkeypatch):
    """Before the processes know of each other, or have compared what they have."""
    broken = RuntimeError(f"{GLOO}Read error [10.0.0.2]:59275: Connection reset by peer{TYPICALLY}")

    def fail(*_):
        raise broken

    plan = SimpleNamespace(**vars(launched.plan), total_steps=1, train=SimpleNamespace(max_time=None), plain={})
    plan.settings.progress, plan.settings.float32_matmul_precision = False, None
    monkeypatch.setattr(launch, "_connect", lambda *_: launched)
    monkeypatch.setattr(launch, "require_same", fail)
    for _ in range(2):
        with pytest.raises(TrainingStopped, match="the connection to another process is lost"), launch.launch(plan):
            pass
        monkeypatch.setattr(torch.distributed, "all_gather_object", fail)
        monkeypatch.setattr(launch, "require_same", lambda *_: None)


def test_other_errors_stay(launched):
    """Among them those of gloo for messages that differ in length, which are faults of the program."""
    for text in ("mat1 and mat2 shapes cannot be multiplied", f"{GLOO}op.preamble.length <= op.nbytes. 8 vs 4"):
        with pytest.raises(RuntimeError, match=text[-8:]) as raised, peers.explaining_lost_peers(launched):
            raise RuntimeError(text)
        assert raised.type is RuntimeError


# Elsewhere the end of a process that is no child cannot be seen, for which `end_of` reads /proc.
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_how_a_process_has_ended():
    """Of a child it is known how, and the child can still be waited for."""
    sleeping = subprocess.Popen(["sleep", "1000"])
    assert peers.end_of(sleeping.pid) is None
    assert peers.end_of(os.getppid()) is None
    sleeping.kill()
    os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)
    assert peers.end_of(sleeping.pid) == ("was ended by SIGKILL, as by the system when memory runs out", True)
    assert sleeping.wait() == -signal.SIGKILL
    assert peers.end_of(sleeping.pid) == ("has ended, see its output", False)  # nobody's child any more
    for status, failed in ((0, False), (3, True), (130, False)):
        ended = subprocess.Popen(["sh", "-c", f"exit {status}"])
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert peers.end_of(ended.pid) == (f"has ended with status {status}, see its output", failed)
        ended.wait()


def test_those_that_failed_are_named_first():
    """Others may have ended because of them."""
    ended = [(peers.Peer(rank, "here", 10 + rank), peers.End("has ended", rank == 2)) for rank in range(1, 7)]
    assert peers._words(ended) == "rank 2 (process 12) has ended"
    several = peers._words([(peer, end._replace(failed=False)) for peer, end in ended])
    assert several.startswith("rank 1 (process 11) has ended; rank 2")
    assert several.endswith("; 3 others as well")


def test_the_parent_of_a_failed_process_ends(tmp_path, launched, monkeypatch):
    """As under NCCL, where the main thread waits in native code and hears nothing."""
    child = subprocess.Popen(["sh", "-c", "exit 3"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    closed, ended = [], []

    def end(status):
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    launched.fabric.step = 5
    launched.reporter = SimpleNamespace(close=lambda step, error: closed.append((step, str(error))))
    with pytest.raises(SystemExit):
        peers._watch(launched, [peers.Peer(1, "here", child.pid)], threading.Event())
    assert ended == [1]
    assert closed[0][0] == 5
    assert closed[0][1].startswith(f"rank 1 (process {child.pid}) has ended with status 3, see its output. There is no")
    assert child.wait() == 3
