"""Runs of one recipe in several ways, and whether they come to the same."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.runs import logged, weights_of
from tests.training.processes import trained_in_ranks

STEPS, SAVED = 6, 2
"""Steps of a run, and after how many the first checkpoint is saved, from which others go on."""
_COLUMNS = ("loss", "val_loss", "grad_norm", "learning_rate")
"""Beside those of experts."""
_AT_ODDS, _APART = 4, 20
"""How many loads may be others in the first step with such, and how many times the error what follows."""


class Refused(Exception):
    """A recipe is refused; the message is the setting that is named."""


@dataclass(frozen=True)
class Runs:
    """Runs of one recipe.

    Attributes:
        folder: Where they are.
        write: Writes the recipe with changed sections.
        sections: What the attack changes.
    """

    folder: Path
    write: Callable[..., Path]
    sections: dict[str, Any]

    def recipe(self, name: str, micro_batch: int | None = None, **changes: Any) -> Path:
        """Write the recipe of a run.

        Args:
            name: Of its directory.
            micro_batch: Rows that go through the model at once, if not as the sections say.
            **changes: More sections.
        """
        sections = copy.deepcopy(self.sections)
        train = sections["train"]
        train["max_tokens"] = STEPS * train["global_batch_size"] * sections["model_config"].get("block_size", 32)
        train |= {"save_interval": SAVED, "min_lr": 0.01} | ({"micro_batch_size": micro_batch} if micro_batch else {})
        return self.write(name, out_dir=str(self.folder / name), **sections, **changes)

    def train(
        self, name: str, *flags: str | Path, ranks: int = 1, micro_batch: int | None = None, **changes: Any
    ) -> Path:
        """Train, and return the directory of the run.

        Args:
            name: Of the directory.
            *flags: The rest of the command line.
            ranks: Number of processes.
            micro_batch: As in `recipe`.
            **changes: More sections.

        Raises:
            Refused: If the settings are refused in one line.
        """
        file = self.recipe(name, micro_batch, **changes)
        said, statuses = trained_in_ranks(ranks, "--config", file, *flags, OMP_NUM_THREADS="1")
        errors = [line for line in said[0].splitlines() if line.startswith("error: ")]
        if statuses == [2] * ranks and len(errors) == 1 and "Traceback" not in said[0]:
            raise Refused(errors[0].removeprefix("error: "))
        assert statuses == [0] * ranks, "\n".join(said)
        return self.folder / name


def checkpoint_of(run: Path) -> Path:
    """Return the first checkpoint of a run."""
    return run / f"step-{SAVED:08}"


def check_same(ours: Path, theirs: Path) -> None:
    """Check that two runs have the same weights, averages included, and the same rows in their tables, bit for bit."""
    first, second = _weights(ours / "final"), _weights(theirs / "final")
    assert first.keys() == second.keys()
    different = [name for name, weight in first.items() if not torch.equal(weight, second[name])]
    assert not different, f"{ours.name} has other {', '.join(different)}"
    for column, step, value, expected in _numbers(ours, theirs):
        assert value == expected, f"{ours.name}: {column} of step {step} is {value}, not {expected}"


def check_close(ours: Path, theirs: Path, error: float = 1e-3, validation: bool = True) -> str:
    """Check that two runs are the same in every step, and change the weights alike, but for rounding.

    Rounding sends a token between two experts to the other one, once in some hundred runs. What follows is a training
    of its own, which is held against the other less strictly.

    Args:
        ours: A run, which may have gone on from a checkpoint of the other.
        theirs: Another.
        error: How far numbers may be apart: a part of the larger one, of 1, or of the largest change of a weight.
        validation: Whether both are validated with the same tokens, which are as many as micro-batches have.

    Returns:
        What to say of such a token, or nothing.
    """
    numbers = list(_numbers(ours, theirs))
    moved = [step for column, step, value, expected in numbers if column.startswith("moe_load") and value != expected]
    since = min(moved, default=STEPS + 1)
    assert moved.count(since) <= _AT_ODDS, f"{ours.name}: {moved.count(since)} loads of step {since} are others"
    for column, step, value, expected in numbers:
        if (column == "val_loss" and not validation) or (step >= since and column.startswith("moe")):
            continue
        difference = abs(float(value) - float(expected)) / max(1.0, abs(float(expected)))
        allowed = error if step < since else _APART * error
        assert difference <= allowed, f"{ours.name}: {column} of step {step} is {value}, not {expected}"
    if moved:
        return ", but for a token between experts"
    before, first, second = (_weights(folder) for folder in (checkpoint_of(theirs), ours / "final", theirs / "final"))
    assert first.keys() == second.keys()
    for name, weight in second.items():
        largest = max(_largest(weight - before[name]), 1e-2)
        difference = _largest(first[name] - weight)
        assert difference <= error * largest, f"{ours.name}: {name} differs by {difference:.1e} of {largest:.1e}"
    return ""


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    averages = weights_of(checkpoint / "ema") if (checkpoint / "ema").exists() else {}
    return weights_of(checkpoint) | {f"the average of {name}": weight for name, weight in averages.items()}


def _largest(weight: Tensor) -> float:
    return weight.float().abs().max().item()


def _numbers(ours: Path, theirs: Path) -> Iterator[tuple[str, int, str, str]]:
    """Yield columns, steps and what two runs have written there, in the steps that both have."""
    with open(theirs / "metrics-wide.csv") as table:
        columns = table.readline().strip().split(",")
    steps = set(logged(ours, "loss"))
    left_out = {int(file.name.split("-")[1]) for file in (ours / "anomalies").glob("step-*")}
    # What experts did comes from the last step that was not left out, which no checkpoint holds.
    begin, with_experts = min(steps), min(steps - left_out, default=STEPS + 1)
    for column in columns:
        if column not in _COLUMNS and not column.startswith("moe"):
            continue
        first, second = logged(ours, column), logged(theirs, column)
        since = with_experts if column.startswith("moe") else begin
        assert first.keys() == {step for step in second if step >= since}, (ours.name, column)
        for step, value in first.items():
            yield column, step, value, second[step]
