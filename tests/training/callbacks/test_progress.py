"""The progress bar as it looks in a terminal of 80 and of 120 columns, and the lines that replace it in a pipe."""

import re

import pytest

from litgpt_moe_ext.cli.commands.model_card import _flops
from litgpt_moe_ext.training.callbacks import progress
from litgpt_moe_ext.training.callbacks.progress import Reporter
from litgpt_moe_ext.training.control import Deadline
from litgpt_moe_ext.wording import abbreviated

METRICS = {
    "loss": 5.12345,
    "moe/max_vio": 0.353,
    "grad_norm": 1.234,
    "learning_rate": 4e-4,
    "tokens_per_second": 12345.0,
    "memory_gb": 12.3,
    "data_wait": 0.034,
}


def rendered(capsys, monkeypatch, width: int, steps: int = 12000, since: int = 0) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    reporter = Reporter(steps, bar=True)
    reporter.val_loss = 5.678
    reporter.on_logged({**METRICS, "step": steps // 2})
    reporter.close(steps // 2 + since)
    (line,) = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    return re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line)


@pytest.mark.parametrize(("width", "last"), [(80, "MaxVio 0.35"), (120, "12.3k tok/s")])
def test_bar_shows_what_matters_most_first(capsys, monkeypatch, width, last):
    """Cut off at the end of the text, never wrapped, and the count of steps is whole."""
    line = rendered(capsys, monkeypatch, width)
    assert len(line) <= width
    assert "6000/12000" in line
    assert "loss 5.123 · val 5.678" in line
    assert last in line
    assert line.endswith("…")


def test_bar_stands_where_the_training_ended(capsys, monkeypatch):
    """Some steps after the last line of numbers."""
    assert "6007/12000" in rendered(capsys, monkeypatch, 80, since=7)


def test_bar_shows_everything_where_there_is_room(capsys, monkeypatch):
    line = rendered(capsys, monkeypatch, 160)
    parts = ("loss 5.123", "val 5.678", "MaxVio 0.35", "grad 1.23", "lr 4.0e-04", "12.3k tok/s", "12.30 GB")
    assert line.endswith(" · ".join([*parts, "data wait 3%"]))


def test_nothing_is_taken_for_one_of_litgpts_lines(capsys):
    """A callback may say what begins like one of them."""
    said = ["Epoch 3 begins", "iter is a word", "| a | table |", "--------", "Validating ... the tokenizer"]
    reporter = Reporter(100, bar=False)
    for line in said:
        reporter.show(line)
    assert capsys.readouterr().out.splitlines() == said


def test_a_line_per_step_in_a_pipe(capsys):
    reporter = Reporter(100, bar=False)
    reporter.on_logged({**METRICS, "step": 1})
    reporter.on_logged({**METRICS, "step": 2})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/100 | loss 5.123 | MaxVio 0.35 | grad 1.23 | lr 4.0e-04")
    assert second.startswith("step 2/100")
    assert second.endswith("left")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.5, "1k"), (12_345, "12.3k"), (999_600, "1M"), (999.96e6, "1B"), (15e12, "15T")],
)
def test_large_numbers_have_three_digits(number, text):
    assert abbreviated(number) == text
    assert _flops(number) == f"{text.rstrip('kMBT')} {text.lstrip('0123456789.').replace('B', 'G')}FLOP"


def test_the_time_left_is_that_of_the_time_limit(capsys, monkeypatch):
    """Where it ends the training before its last step; also in the bar."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    deadline = Deadline(90.0)
    reporter = Reporter(100, bar=False, deadline=deadline)
    for step in (1, 2):
        reporter.on_logged({**METRICS, "step": step})
    assert capsys.readouterr().out.endswith("| 0:01:30 left\n")
    reporter.on_logged({**METRICS, "step": 98})
    assert capsys.readouterr().out.endswith("| 0:00:00 left\n")

    monkeypatch.setenv("COLUMNS", "120")
    reporter = Reporter(100, bar=True, deadline=deadline)
    for step in (1, 2):
        reporter.on_logged({**METRICS, "step": step})
    reporter.close(2)
    assert " 0:01:30 " in capsys.readouterr().out
