"""Signals at chosen moments of a run in this process; `test_processes.py` and `test_distributed.py` have real ones."""

import os
import queue
import signal
import threading
import time

import litgpt.pretrain
import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from litgpt_moe_ext.training import control
from litgpt_moe_ext.training.parallel import processes
from tests.runs import PATIENCE, logged, small_disk, train
from tests.training.processes import train_in_ranks, trained_in_ranks


@pytest.fixture
def signal_at(monkeypatch):
    """Have the process send itself a signal in the n-th call of a function of `litgpt.pretrain`."""

    def arrange(number: int, function: str, call: int, times: int = 1) -> None:
        original, calls = getattr(litgpt.pretrain, function), []

        def signalling(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(litgpt.pretrain, function, signalling)

    return arrange


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_in_a_step(recipe, tmp_path, capsys, signal_at, name):
    """The step is finished and saved, and the exit status tells which signal it was."""
    number = getattr(signal, name)
    # Two validation batches and the measurement of FLOPs come first; two batches make a step.
    signal_at(number, "chunked_cross_entropy", 3 + 5)
    handler = signal.getsignal(number)
    assert train("--config", recipe(train={"save_interval": 1000})) == 128 + number
    saved = tmp_path / "out" / "step-00000003"
    assert (saved / "lit_model.pth").is_file()
    output = capsys.readouterr()
    assert f"{name} received: finishing the step, then saving" in output.out
    assert f"Stopped by {name}, saved as {saved}; --resume auto continues." in output.err
    assert signal.getsignal(number) is handler


def test_a_hangup_that_is_ignored(recipe, tmp_path, monkeypatch, signal_at):
    """As after `nohup`."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(signal.SIGHUP, "chunked_cross_entropy", 3 + 5)
        assert train("--config", recipe()) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_twice_within_a_moment(recipe, tmp_path, capsys, monkeypatch, signal_at):
    """`timeout -s INT` and `uv run` in a terminal deliver one Ctrl-C twice: the step is saved all the same."""
    monkeypatch.setattr(control, "MOMENT", 600.0)
    signal_at(signal.SIGINT, "chunked_cross_entropy", 3 + 5, times=2)
    assert train("--config", recipe(train={"save_interval": 1000})) == 130
    saved = tmp_path / "out" / "step-00000003"
    assert (saved / "lit_model.pth").is_file()
    output = capsys.readouterr()
    assert output.out.count("SIGINT received") == 1
    assert f"saved as {saved}" in output.err


def test_twice_on_purpose(recipe, tmp_path, capsys, monkeypatch, signal_at):
    """A second Ctrl-C after that moment ends the run in the middle of the step."""
    monkeypatch.setattr(control, "MOMENT", 0.0)
    signal_at(signal.SIGINT, "chunked_cross_entropy", 3 + 5, times=2)
    assert train("--config", recipe(train={"save_interval": 1000})) == 130
    assert "Stopped at once" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("step-*"))


def test_while_the_output_waits_for_its_reader():
    """As in a terminal after Ctrl-S: nothing more can be written, and the signal counts all the same."""
    reader, writer = os.pipe()

    def signal_then_read() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        while os.read(reader, 1 << 16):
            pass

    with open(writer, "w") as output:
        said = queue.Queue()
        requests = control.StopRequests(lambda text: said.put(print(text, file=output, flush=True)))
        thread = threading.Thread(target=signal_then_read)
        with requests.listening():
            thread.start()
            print("x" * (1 << 20), file=output, flush=True)
            said.get(timeout=PATIENCE)
    thread.join()
    os.close(reader)
    assert requests.received == signal.SIGTERM


def test_what_is_said_of_a_signal_comes_before_what_follows(monkeypatch):
    """However late the thread begins that says it."""
    monkeypatch.setattr(control, "_MESSAGE_SECONDS", PATIENCE)
    said = []
    requests = control.StopRequests(lambda text: said.append((time.sleep(0.2), text)))
    with requests.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(said) == 1


def test_before_the_first_step(recipe, tmp_path, capsys, signal_at):
    """Nothing is saved, and nothing promised."""
    signal_at(signal.SIGINT, "validate", 1)
    assert train("--config", recipe()) == 130
    error = capsys.readouterr().err
    assert "Stopped by SIGINT before the first step was finished: there is nothing to continue from." in error
    assert "--resume" not in error
    assert not list((tmp_path / "out").glob("step-*"))


@pytest.mark.parametrize(("function", "call"), [("validate", 2), ("save_config", 1)])
def test_after_the_last_step(recipe, tmp_path, capsys, signal_at, function, call):
    """In the final validation, or while `final` is written: it is saved all the same, and the status tells."""
    signal_at(signal.SIGTERM, function, call)
    file = recipe(train={"max_tokens": 128, "save_interval": None})
    assert train("--config", file) == 143
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()
    assert f"Stopped by SIGTERM, saved as {tmp_path / 'out' / 'final'}; --resume auto" in capsys.readouterr().err


def test_in_a_validation(recipe, finished, tmp_path, capsys, signal_at):
    """It is left, no loss of a part of it is logged, and the run that goes on validates those weights first."""
    file = recipe()
    signal_at(signal.SIGTERM, "chunked_cross_entropy", 2 + 4 * 2 + 1)  # in the first of its two batches
    assert train("--config", file) == 143
    assert f"saved as {tmp_path / 'out' / 'step-00000004'}" in capsys.readouterr().err
    assert not logged(tmp_path / "out", "val_loss")
    assert train("--config", file, "--resume", "auto") == 0
    finished(tmp_path / "plain")
    for column in ("loss", "val_loss", "grad_norm"):
        assert logged(tmp_path / "out", column) == logged(tmp_path / "plain", column)
    tables = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("out", "plain")]
    assert [line.split(",")[:4] for line in tables[0]] == [line.split(",")[:4] for line in tables[1]]
    assert capsys.readouterr().out.count("  validation loss") == 3


def test_in_the_last_validation(recipe, tmp_path, signal_at):
    """Which is the end of the run anyway: it goes on, with the state saved first."""
    signal_at(signal.SIGTERM, "chunked_cross_entropy", 2 + 2 + 1)
    assert train("--config", recipe(train={"max_tokens": 128, "save_interval": None})) == 143
    assert list(logged(tmp_path / "out", "val_loss")) == [1]
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()
    assert (tmp_path / "out" / "step-00000001" / "lit_model.pth").is_file()


@pytest.mark.slow
def test_in_a_validation_of_two(recipe, tmp_path):
    """Both leave it before the same batch, whichever has received the signal."""
    callback = {"class_path": "tests.training.signalling.SignalInValidation", "init_args": {"rank": 1, "step": 4}}
    file = recipe(devices=2, train={"micro_batch_size": 1}, eval={"max_iters": 8}, callbacks=[callback])
    outputs, statuses = trained_in_ranks(2, "--config", file)
    assert statuses == [143, 143], outputs
    assert ["Stopped by SIGTERM, saved as" in output for output in outputs] == [True, False]
    assert (tmp_path / "out" / "step-00000004" / "lit_model.pth").is_file()
    assert not logged(tmp_path / "out", "val_loss")
    train_in_ranks(2, "--config", file, "--resume", "auto")
    assert list(logged(tmp_path / "out", "val_loss")) == [4, 8, 12]


@pytest.mark.usefixtures("finished")  # has prepared the corpus, for which there would be no room
def test_nothing_is_called_saved_that_is_not(recipe, capsys, signal_at):
    """A run that may go on without a checkpoint does not go on after a signal."""
    signal_at(signal.SIGTERM, "chunked_cross_entropy", 3 + 1)
    file = recipe()
    with small_disk(100_000):
        assert train("--config", file, "--checkpoint.on_save_error", "continue") == 1
    error = capsys.readouterr().err
    assert "step-00000001 could not be saved" in error
    assert "saved as" not in error


@pytest.mark.parametrize(("by_fabric", "status"), [(True, 0), (False, 143)])
def test_only_the_first_process_reports(recipe, capsys, signal_at, monkeypatch, by_fabric, status):
    """One that Fabric started ends without an error, which would make Fabric kill the first."""
    monkeypatch.setattr(processes, "started_by_fabric", lambda: by_fabric)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    signal_at(signal.SIGTERM, "chunked_cross_entropy", 4)
    assert train("--config", recipe()) == status
    assert "Stopped" not in capsys.readouterr().err
