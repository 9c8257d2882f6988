"""Loggers that send a run to a service: litlogger's own, before a stand-in of what talks to the service, and W&B's."""

from unittest.mock import Mock

import litlogger
import pytest

from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.training.checkpoint.writer import CheckpointWriter
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.logs.wandb_run import options, run_of_checkpoint
from tests.subsets import soon


class Service:
    """What `litlogger.Experiment` does, without a network.

    Attributes:
        fails: When it does not work: at the start, while metrics are sent, at the end, or never.
    """

    fails = ""
    runs: list = []

    def __init__(self, save_logs, **_):
        self.save_logs, self.files, self.metrics, self.status = save_logs, {}, [], None
        self.runs.append(self)
        self._work("start")

    def _work(self, now):
        if now == self.fails:
            raise RuntimeError("Not logged\nin.")

    def print_url(self):
        pass

    def __setitem__(self, key, file):
        self.files[key] = open(file.path).read()  # noqa: SIM115

    def __getitem__(self, key):
        return self

    def append(self, value, step):
        self._work("training")
        self.metrics.append((step, value))

    def finalize(self, status):
        self._work("end")
        self.status = status


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(Service, "runs", [])
    monkeypatch.setattr(litlogger, "Experiment", Service)
    return Service


def test_the_transcript_is_what_the_terminal_showed(recipe, service):
    """litlogger itself would start the command again to see it, and two runs want one `out_dir`."""
    assert main(["--config", str(recipe(train={"max_tokens": 2 * 128})), "--logger_name", "litlogger"]) == 0
    (run,) = service.runs
    assert not run.save_logs
    assert {step for step, _ in run.metrics} == {1, 2}
    (lines,) = run.files.values()
    assert "Trained 256 tokens" in lines
    assert run.status == "success"


def test_not_where_nobody_wants_it(recipe, service):
    flags = ["--logger_name", "litlogger", "--log.save_logs", "false"]
    assert main(["--config", str(recipe(train={"max_tokens": 128})), *flags]) == 0
    assert not service.runs[0].files


def test_a_service_that_refuses_is_one_line_before_anything_else(recipe, service, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(service, "fails", "start")
    assert main(["--config", str(recipe()), "--logger_name", "litlogger"]) == 2
    error = "error: logger_name: 'litlogger' cannot start: Not logged in; mend that, or set csv\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "out" / "train.log").exists()


@pytest.mark.parametrize(("when", "said"), [("training", " Training goes on."), ("end", "")])
def test_a_service_that_fails_later_ends_no_run(recipe, service, tmp_path, capsys, monkeypatch, when, said):
    monkeypatch.setattr(service, "fails", when)
    assert main(["--config", str(recipe(train={"max_tokens": 2 * 128})), "--logger_name", "litlogger"]) == 0
    assert capsys.readouterr().out.count(f"  the logger failed: Not logged in.{said}\n") == 1
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()


def test_a_run_of_wandb_ends_with_its_training(recipe, monkeypatch):
    """The next training of the process has another one; but what was open before is somebody else's to end."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "run", None)  # a disabled one stays after its end
    arguments = ["--config", str(recipe(train={"max_tokens": 128})), "--logger_name", "wandb"]
    assert main(arguments) == 0
    assert wandb.run is None
    with wandb.init() as mine:
        assert main(arguments) == 0
        assert wandb.run is mine


@pytest.mark.parametrize("ends", [True, False])
def test_wandb_is_told_whether_a_run_failed(recipe, monkeypatch, ends):
    import wandb

    codes = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "run", None)  # what is not finished here is forgotten at the end
    with wandb.init() as some:
        pass
    monkeypatch.setattr(type(some), "finish", lambda run, exit_code=0: codes.append(exit_code))
    wandb.run = None
    if not ends:
        monkeypatch.setattr(CheckpointWriter, "save_checkpoint", Mock(side_effect=TrainingStopped("no")))
    assert main(["--config", str(recipe(train={"max_tokens": 128})), "--logger_name", "wandb"]) == int(not ends)
    assert codes == [int(not ends)]


@pytest.fixture
def runs_of_wandb(monkeypatch):
    """With what W&B is asked for each run, and which one it makes of it."""
    import wandb

    init, seen = wandb.init, []

    def ask(**asked):
        run = init(mode="disabled", id=asked["id"])
        seen.append((asked["resume"], asked["id"], run.id))
        return run

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", ask)
    monkeypatch.setattr(wandb, "setup", lambda: Mock(settings=Mock(mode="online")))
    return seen


def test_a_resumed_training_goes_on_in_its_run_of_wandb(recipe, tmp_path, runs_of_wandb):
    """And no other one does, which is started in the same place: with resume=True W&B would take whatever is open."""
    train = ["--logger_name", "wandb", "--resume", "auto", "--config"]
    short, longer = ({"max_tokens": steps * 128} for steps in (2, 4))
    assert main([*train, str(recipe(train=short))]) == 0
    assert main([*train, str(recipe(train=short, out_dir=str(tmp_path / "other")))]) == 0
    assert main([*train, str(recipe(train=longer))]) == 0
    assert main([*train[:2], "--config", str(recipe(train=longer)), "--resume", str(tmp_path / "other")]) == 0
    (_, _, first), (_, _, other), *_ = runs_of_wandb
    assert [asked for *asked, _ in runs_of_wandb] == [
        ["allow", None],
        ["allow", None],
        ["allow", first],
        ["allow", other],
    ]
    assert first != other


@pytest.mark.parametrize("reason", soon(["offline", "named", "damaged"], ["offline"]))
def test_a_run_of_wandb_that_cannot_go_on(recipe, tmp_path, runs_of_wandb, monkeypatch, reason):
    """It would lose steps when it is sent, is another's choice, or was never a name."""
    import wandb

    arguments = ["--config", str(recipe(train={"max_tokens": 128})), "--logger_name", "wandb", "--resume", "auto"]
    assert main(arguments) == 0
    if reason == "offline":
        monkeypatch.setattr(wandb, "setup", lambda: Mock(settings=Mock(mode="offline")))
    elif reason == "named":
        monkeypatch.setenv("WANDB_RUN_ID", "mine")
    else:
        for file in (tmp_path / "out").glob("*/wandb_run.txt"):
            file.write_text("a/b")
    assert run_of_checkpoint("auto", tmp_path / "out") == (None if reason == "damaged" else runs_of_wandb[0][2])
    assert options("auto", tmp_path / "out").get("id") is None
