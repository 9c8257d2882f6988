"""What a run leaves behind to read."""

import csv
import errno
import fcntl
import io
import itertools
import math
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from litgpt_moe_ext.software import software
from litgpt_moe_ext.training.callbacks.progress import Reporter
from litgpt_moe_ext.training.logs import metrics
from litgpt_moe_ext.training.logs.metrics import COLUMNS, MetricsTables, grouped
from litgpt_moe_ext.training.logs.table import StepTable
from litgpt_moe_ext.training.logs.transcript import Transcript
from tests.runs import PATIENCE, ROOT, small_disk, train


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_step_over_a_resume(recipe, tmp_path, capsys):
    """The tables have every step once and in order, whatever was trained after the checkpoint that is resumed."""
    out = tmp_path / "out"
    file = recipe(train={"max_tokens": 7 * 128, "save_interval": 3}, eval={"interval": 3})
    assert train("--config", file) == 0
    whole, wide = rows_of(out / "metrics.csv"), rows_of(out / "metrics-wide.csv")
    columns = "step,epoch,tokens,iter_tokens,train_loss,val_loss,learning_rate,grad_norm,max_vio,tokens_per_second,time"
    assert (out / "metrics.csv").read_text().splitlines()[0] == columns
    assert [int(row["step"]) for row in whole] == [int(row["step"]) for row in wide] == [1, 2, 3, 4, 5, 6, 7]
    assert [bool(row["val_loss"]) for row in whole] == [False, False, True, False, False, True, True]
    assert [row["tokens"] for row in whole] == [str(128 * step) for step in range(1, 8)]
    assert {row["iter_tokens"] for row in whole} == {"128"}
    for column, name in COLUMNS.items():
        if column not in ("iter_tokens", "time"):
            assert [row[column] for row in whole] == [row[name] for row in wide], column
            assert any(row[column] for row in whole), column
    for ppl, loss in (("ppl", "loss"), ("val_ppl", "val_loss")):
        pairs = [(float(row[ppl]), float(row[loss])) for row in wide if row[ppl] or row[loss]]
        assert [math.log(value) for value, _ in pairs] == pytest.approx([value for _, value in pairs]), ppl
    printed = capsys.readouterr().out
    lines = (out / "train.log").read_text()
    assert printed[printed.index("tiny: ") :] in lines
    assert f"\nCode: {software()}\n" in lines
    assert "Code: " not in printed
    assert f"Metrics: {out / 'metrics.csv'}, log: {out / 'train.log'}" in lines

    # As if the run had been killed after step 7, in the middle of a row.
    with open(out / "metrics.csv", "a") as table:
        table.write("8,0,1024,128,5.1,,0.001,1.0,0.5,9000,1.2")  # of 1.234
    (out / "final").rename(tmp_path / "elsewhere")
    for name in ("step-00000006", "best"):
        (out / name).rename(tmp_path / name)
    assert train("--config", file, "--resume", "auto") == 0
    for name in ("metrics.csv", "metrics-wide.csv"):
        again = rows_of(out / name)
        assert [int(row["step"]) for row in again] == [1, 2, 3, 4, 5, 6, 7]
    again = rows_of(out / "metrics.csv")
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in whole]
    times = [float(row["time"]) for row in again]
    assert times == sorted(times)
    resumed = (out / "train.log").read_text().removeprefix(lines)
    assert resumed != lines
    assert resumed.count(f"Code: {software()}\n") == 1


def test_a_step_that_is_shown_is_in_the_tables(recipe, tmp_path, monkeypatch):
    """Whoever kills the run after reading the line of a step finds its row."""
    show, shown = Reporter.on_logged, []

    def on_logged(self, metrics):
        if "loss" in metrics:
            rows = [rows_of(tmp_path / "out" / name)[-1]["step"] for name in ("metrics.csv", "metrics-wide.csv")]
            assert rows == [str(metrics["step"])] * 2
            shown.append(metrics["step"])
        show(self, metrics)

    monkeypatch.setattr(Reporter, "on_logged", on_logged)
    assert train("--config", recipe(train={"max_tokens": 4 * 128})) == 0
    assert shown == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_terminal_with_a_bar_keeps_the_lines(recipe, tmp_path):
    """In a terminal a bar takes the place of the lines; train.log has them, and nothing of the bar."""
    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "run_train.py"), "--config", str(recipe(train={"max_tokens": 4 * 128}))]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, cwd=ROOT)
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:  # how Linux says that the other side is closed
        pass
    assert process.wait(PATIENCE) == 0, shown.decode()
    lines = (tmp_path / "out" / "train.log").read_text()
    assert b"\x1b[" in shown
    assert b"4/4" in shown
    assert "\x1b" not in lines
    for step in range(1, 5):
        assert sum(line.startswith(f"step {step}/4 | loss ") for line in lines.splitlines()) == 1
    assert lines.count("  validation loss") == 1
    assert "━" not in lines
    assert lines.rstrip().splitlines()[-1].startswith("To continue: ")


@pytest.mark.slow
@pytest.mark.parametrize(("ignored", "status"), [(False, 129), (True, 0)])
def test_a_terminal_that_is_closed(recipe, tmp_path, ignored, status):
    """The run saves and ends; after `nohup` or `disown` it goes on, with nothing to draw its bar on."""
    master, terminal = pty.openpty()

    def own_the_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    steps = 300 if ignored else 100_000
    file = recipe(train={"max_tokens": steps * 128, "save_interval": 100_000}, eval={"interval": 100})
    run = subprocess.Popen(
        [sys.executable, ROOT / "run_train.py", "--config", file],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=own_the_terminal,
    )
    os.close(terminal)
    shown = b""
    while "grad" not in shown.decode(errors="replace"):
        shown += os.read(master, 4096)
    os.close(master)
    assert run.wait(PATIENCE) == status
    log = (tmp_path / "out" / "train.log").read_text()
    if ignored:
        assert "the output cannot be written: Input/output error" in log
        assert "To continue: --resume auto" in log
        assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()
    else:
        assert len(list((tmp_path / "out").glob("step-*"))) == 1


def test_progress_into_a_file_keeps_the_lines(recipe, capsys):
    assert train("--config", recipe(train={"max_tokens": 2 * 128}), "--progress", "true") == 0
    assert "step 2/2 | loss " in capsys.readouterr().out


def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path):
    """As are those with fewer or more cells than there are columns."""
    file = tmp_path / "table.csv"
    file.write_text("step,loss\n1,2.5\n2\n2,2.25,7\n2,2.25\n3,2.1")
    table = StepTable(file, lambda present, new: [*present, *new], print)
    assert table.start(9) == {"step": "2", "loss": "2.25"}
    table.put(2, {"val_loss": 2.5})
    assert file.read_text() == "step,loss,val_loss\n1,2.5,\n2,2.25,2.5\n", "a validation before the next step"
    table.put(3, {"loss": 2.125})
    assert file.read_text() == "step,loss,val_loss\n1,2.5,\n2,2.25,2.5\n3,2.125,\n"
    table.put(3, {"loss": 2.0})
    assert file.read_text() == "step,loss,val_loss\n1,2.5,\n2,2.25,2.5\n3,2.0,\n"


def test_rows_wait_until_there_is_room(tmp_path):
    """A full disk is said once and ends nothing; when there is room again, no row is missing and none is cut."""
    said = []
    table = StepTable(tmp_path / "table.csv", lambda present, new: [*present, *new], said.append)
    table.start(None)
    table.put(1, {"loss": "a"})
    with small_disk(20):
        for step in range(2, 9):
            table.put(step, {"loss": "x" * 9})
    assert len(said) == 1
    assert "table.csv cannot be written: File too large" in said[0]
    table.put(8, {"val_loss": "z"})
    rows = rows_of(tmp_path / "table.csv")
    assert [row["step"] for row in rows] == list("12345678")
    assert rows[0]["loss"] == "a"
    assert rows[-1] == {"step": "8", "loss": "x" * 9, "val_loss": "z"}


def test_a_column_that_there_was_no_room_for_comes_with_its_rows(tmp_path):
    table = StepTable(tmp_path / "table.csv", lambda present, new: [*present, *new], lambda line: None)
    table.start(None)
    table.put(1, {"loss": "a"})
    with small_disk(0):
        table.put(2, {"val_loss": "z"})
    table.put(3, {"loss": "b"})
    assert (tmp_path / "table.csv").read_text() == "step,loss,val_loss\n1,a,\n2,,z\n3,b,\n"


def edited(tmp_path, content: bytes, say) -> bytes:
    """Return a table of two rows that is edited in the meantime, after two more rows with a new column."""
    table = StepTable(tmp_path / "table.csv", lambda present, new: [*present, *new], say)
    table.start(None)
    for step in (1, 2):
        table.put(step, {"loss": "a"})
    (tmp_path / "table.csv").write_bytes(content)
    for step in (3, 4):
        table.put(step, {"val_loss": "z"})
    return (tmp_path / "table.csv").read_bytes()


@pytest.fixture
def fields_of_usual_length():
    """As others raise Python's limit for the whole process."""
    before = csv.field_size_limit(128 * 1024)
    yield
    csv.field_size_limit(before)


@pytest.mark.usefixtures("fields_of_usual_length")
@pytest.mark.parametrize(
    "content", [b"step;loss\n1;a\n2;a\n", "step,loss\n1,a\n2,a\n".encode("utf-16"), b"step\n" + b"x" * 200_000 + b"\n"]
)
def test_a_table_that_somebody_spoils_is_set_aside(tmp_path, content):
    """During a run, and before a resumed one; both go on with another table."""
    said = []
    assert edited(tmp_path, content, said.append) == b"step,loss,val_loss\n2,a,\n3,,z\n4,,z\n"
    (tmp_path / "table.csv").write_bytes(content)
    table = StepTable(tmp_path / "table.csv", lambda present, new: [*present, *new], said.append)
    assert table.start(4) == {}
    table.put(5, {"loss": "b"})
    assert (tmp_path / "table.csv").read_text() == "step,loss\n5,b\n"
    assert [f"It is now {tmp_path / 'table.csv'}-earlier-{i}." in said[i - 1] for i in (1, 2)] == [True] * len(said)
    assert [(tmp_path / f"table.csv-earlier-{i}").read_bytes() for i in (1, 2)] == [content] * 2


@pytest.mark.parametrize(
    ("content", "result"),
    [
        ("step,loss,note\n1,a,good\n2,a,\n", "step,loss,note,val_loss\n1,a,good,\n2,a,,\n3,,,z\n4,,,z\n"),
        ("\ufeffstep,loss,note\r\n1,b\r\n2,a", "step,loss,note,val_loss\n1,b,,\n2,a,,\n3,,,z\n4,,,z\n"),
        ("step,loss\n", "step,loss,val_loss\n2,a,\n3,,z\n4,,z\n"),
        ("", "step,loss,val_loss\n2,a,\n3,,z\n4,,z\n"),
    ],
)
def test_what_somebody_edits_during_a_run_stays(tmp_path, content, result):
    """A column more, with its cells or without, a byte order mark, or rows less but the last, which may still grow."""
    assert edited(tmp_path, content.encode(), print).decode() == result


def test_no_more_rows_wait_than_there_is_memory_for(tmp_path, monkeypatch):
    monkeypatch.setattr(StepTable, "KEPT", 3)
    table = StepTable(tmp_path / "none" / "table.csv", lambda present, new: [*present, *new], lambda line: None)
    for step in range(1, 6):
        table.put(step, {"loss": step})
    (tmp_path / "none").mkdir()
    table.put(5, {"val_loss": 7})
    assert (tmp_path / "none" / "table.csv").read_text() == "step,loss,val_loss\n3,3,\n4,4,\n5,5,7\n"


def test_logs_that_cannot_be_written_end_nothing(recipe, tmp_path, capsys, monkeypatch):
    """The run says so, trains on, and saves its checkpoints."""
    real_open = open

    def full(path, mode="r", *args, **kwargs):
        if Path(str(path)).name in ("metrics.csv", "metrics-wide.csv", "train.log") and mode != "r":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(path, mode, *args, **kwargs)

    for module in ("table", "transcript"):
        monkeypatch.setattr(f"litgpt_moe_ext.training.logs.{module}.open", full, raising=False)
    assert train("--config", recipe(train={"max_tokens": 2 * 128})) == 0
    output = capsys.readouterr().out
    for name in ("metrics.csv", "metrics-wide.csv", "train.log"):
        assert output.count(f"{name} cannot be written: No space left on device") == 1
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()


@pytest.mark.parametrize(("time", "passed"), [("2.5", 2.5), ("2,5 s", 0.0)])
def test_a_time_that_is_no_number_counts_for_nothing(tmp_path, monkeypatch, time, passed):
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=itertools.count(100).__next__))
    (tmp_path / "metrics.csv").write_text(f'step,time\n1,"{time}"\n')
    table = MetricsTables(tmp_path, 8, False, SimpleNamespace(step=1, print=print))
    table.on_fit_begin(tmp_path)
    table.on_logged({"loss": 1.0})
    (row,) = rows_of(tmp_path / "metrics.csv")
    assert float(row["time"]) == passed + 1, "a look at the clock later"


def test_columns_that_somebody_has_changed(tmp_path):
    """One was added and one deleted: the rows keep the first, and get the second again."""
    (tmp_path / "metrics.csv").write_text("step,train_loss,note\n1,2.5,good\n")
    table = MetricsTables(tmp_path, 8, False, SimpleNamespace(step=1, print=print))
    table.on_fit_begin(tmp_path)
    table._fabric.step = 2
    table.on_logged({"loss": 1.0})
    first, second = rows_of(tmp_path / "metrics.csv")
    assert (first["train_loss"], first["note"], second["train_loss"], second["note"]) == ("2.5", "good", "1.0", "")


def test_tokens_are_those_of_all_processes(tmp_path):
    """What LitGPT calls tokens are those of one."""
    table = MetricsTables(tmp_path, 128, False, SimpleNamespace(step=3, print=print))
    table.on_fit_begin(None)
    table.on_logged({"loss": 2.0, "tokens": 192, "total_tokens": 384})
    (row,) = rows_of(tmp_path / "metrics.csv")
    assert (row["step"], row["tokens"], row["iter_tokens"]) == ("3", "384", "128")


def test_columns_come_in_groups():
    names = [
        "zeta",
        "moe_load_01/expert_01",
        "val_loss",
        "moe/max_vio",
        "moe_layer_01/a",
        "loss",
        "moe_load_01/expert_00",
    ]
    assert grouped(["step"], [*names, "moe_layer_00/b"]) == [
        *("step", "loss", "val_loss", "zeta", "moe/max_vio", "moe_layer_00/b", "moe_layer_01/a"),
        *("moe_load_01/expert_00", "moe_load_01/expert_01"),
    ]
    assert list(COLUMNS)[0] == "step"


def test_a_thread_may_write_to_a_transcript_that_ends(tmp_path):
    """As what says that a signal has come: the file may be closed while it writes."""
    transcript = Transcript()
    transcript.open(tmp_path / "train.log")
    transcript._file.close()
    transcript.line("SIGTERM received")
    assert (tmp_path / "train.log").read_text() == ""


def test_transcript_keeps_the_last_state_of_a_line(tmp_path, monkeypatch):
    """What was printed before there was a file comes first; a line that was drawn over has its last state."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    transcript = Transcript()
    with transcript.recording():
        print("early")
        transcript.open(tmp_path / "train.log")
        sys.stdout.write("10 %\r50 %\r")
        print("100 %")
        print("\x1b[1mbold\x1b[0m")
    assert (tmp_path / "train.log").read_text() == "early\n100 %\nbold\n"
    assert sys.stdout.getvalue() == "early\n10 %\r50 %\r100 %\n\x1b[1mbold\x1b[0m\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_an_output_that_cannot_be_written_does_not_fail_a_finished_run(monkeypatch):
    """Python writes again at its end what is left; its status would be 120."""
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with Transcript().recording():
            print("step 1/1")
        assert sys.stdout is output
        output.flush()
