"""The results of a study's finished runs, as rows and curves."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE
from litgpt_moe_ext.inspect.recipes import Recipe, load_recipe
from litgpt_moe_ext.inspect.runs.logs import TOKENS, RunLog, load_run
from litgpt_moe_ext.study.launch import FINISHED
from litgpt_moe_ext.study.place import TrainedOn
from litgpt_moe_ext.study.plan import Run
from litgpt_moe_ext.study.report.analysis import first_below
from litgpt_moe_ext.study.text_bytes import bytes_per_token, validated_on
from litgpt_moe_ext.study.twin import count
from litgpt_moe_ext.training.checkpoint.hyperparameters import FILE_NAME as HYPERPARAMETERS
from litgpt_moe_ext.training.checkpoint.progress import step_of
from litgpt_moe_ext.training.logs import WIDE_FILE

MAX_VIO = "moe/max_vio"
# The balance that a router should reach, and the final fraction of a run over which balance and loss are averaged.
EVEN, _LATE = 0.1, 0.2


class Curve(NamedTuple):
    """Values over their cost."""

    tokens: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run: The run.
        log: Its log.
        parameters: Active parameters.
        flops_per_token: Training FLOPs per token.
        bytes_per_token: Bytes per token of the validation text; nan if unknown.
        trained_on: Where it was trained; None if unknown.
    """

    run: Run
    log: RunLog
    parameters: int
    flops_per_token: float
    bytes_per_token: float
    trained_on: TrainedOn | None = None

    @property
    def val_loss(self) -> float:
        """The last validation loss."""
        values = self.log.series("val_loss")[1]
        return float(values[-1]) if len(values) else float("nan")

    @property
    def train_loss(self) -> float:
        """Mean training loss in the last fifth of the run."""
        return _late_mean(self.log.series("loss")[1])

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss in bits per byte of the text."""
        return self.val_loss / math.log(2) / self.bytes_per_token

    @property
    def tokens(self) -> float:
        """Tokens trained on."""
        return float(self.log.columns[TOKENS][-1])

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return self.tokens * self.flops_per_token

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, including validations except those after the last training line.

        nan if no speed was logged.
        """
        return float(self._seconds_after(np.array([self.tokens]))[0])

    @property
    def timed(self) -> bool:
        """Whether its time is meaningful: it did not share its GPU, or cores."""
        return self.trained_on is None or self.trained_on.together == 1

    @property
    def late_max_vio(self) -> float:
        """Mean MaxVio of the worst layer in the last fifth of the run; nan without experts."""
        return _late_mean(self.log.series(MAX_VIO)[1])

    @property
    def late_load_vio(self) -> float:
        """MaxVio of the mean load in the last fifth of the run, worst layer; nan without experts.

        Within one step, tokens are uneven by chance alone: with 16 experts of 512 tokens each on average, the fullest
        expert of four layers has 9 % more. Over many steps chance averages out, which leaves the router's imbalance.
        """
        _, loads = self.log.expert_load()
        means = [_late(load_EN).mean(axis=1) for load_EN in loads.values()]
        return max((float(mean_E.max() / mean_E.mean() - 1) for mean_E in means), default=float("nan"))

    @property
    def even_after(self) -> float:
        """Tokens after which MaxVio stays at or below 0.1; nan if it never does."""
        tokens, values = self.log.series(MAX_VIO)
        index = first_below(values, EVEN)
        return float("nan") if index is None else float(tokens[index])

    def curve(self, metric: str) -> Curve:
        """Return a metric over tokens and seconds, without the time between two parts of a run."""
        tokens, values = self.log.series(metric)
        return Curve(tokens, self._seconds_after(tokens), values)

    def _seconds_after(self, tokens: np.ndarray) -> np.ndarray:
        at, speed = self.log.tokens_per_second()
        if not len(at):
            return np.full(len(tokens), np.nan)
        # The first lines have no speed yet, and the last steps no training line: use the nearest measurement.
        at, speed = np.append(at, self.tokens), np.append(speed, speed[-1])
        seconds = np.cumsum(np.diff(at, prepend=0) / speed)
        return np.interp(tokens, np.append(0, at), np.append(0, seconds))


def _late(values: np.ndarray) -> np.ndarray:
    # The columns of the last fifth of a run.
    return values[..., -max(1, int(values.shape[-1] * _LATE)) :]


def _late_mean(values: np.ndarray) -> float:
    return float(_late(values).mean()) if len(values) else float("nan")


def read_results(runs: Sequence[Run], runs_dir: Path) -> list[Result]:
    """Return the finished runs.

    Args:
        runs: Finished runs.
        runs_dir: Folder of the runs' folders.

    Raises:
        SettingsError: If a run's log or checkpoint was removed or damaged.
    """
    costs: dict[tuple[str, int], tuple[int, float]] = {}
    lengths: dict[tuple, float] = {}
    results = []
    for run in runs:
        folder = runs_dir / run.key
        try:
            results.append(_read_result(run, folder, costs, lengths))
        except (SettingsError, OSError) as error:
            raise SettingsError(
                f"study: {folder} is a finished run, but it cannot be read ({error}); remove it to train it again"
            ) from error
    return results


def _read_result(
    run: Run, folder: Path, costs: dict[tuple[str, int], tuple[int, float]], lengths: dict[tuple, float]
) -> Result:
    final = folder / "final"
    recipe = load_recipe(final)
    log = load_run(folder, run.title)
    if not (final / HYPERPARAMETERS).is_file():
        raise SettingsError(f"{HYPERPARAMETERS} is missing")
    if (problem := _unfinished(log, final, recipe)) is not None:
        raise SettingsError(problem)
    # The cost of attention depends on the sequence length.
    model = (final / CONFIG_FILE).read_text(encoding="utf-8"), recipe.sequence_length
    text = validated_on(recipe)
    if model not in costs:
        costs[model] = _cost(recipe)
    if text not in lengths:
        lengths[text] = bytes_per_token(recipe, final)
    where = _trained_on(folder / FINISHED, recipe.settings.precision)
    return Result(run, log, *costs[model], lengths[text], where)


def _unfinished(log: RunLog, final: Path, recipe: Recipe) -> str | None:
    """Return how a log ends before its run; None if it does not. A full disk does not end a run, but its log."""
    settings, end, steps = recipe.settings, step_of(final), log.columns.get("step")
    if end is None or steps is None:
        return None
    if settings.eval.final_validation:
        losses = log.columns.get("val_loss", np.full(len(steps), np.nan))
        last, whole = max(steps[~np.isnan(losses)], default=0), end
        what = "has validations"
    else:
        last, whole, what = steps[-1], end - settings.train.log_interval + 1, "has lines"
    return f"{WIDE_FILE} {what} to step {last:g} only, of {end}" if last < whole else None


def _trained_on(file: Path, precision: str | None) -> TrainedOn | None:
    try:
        return TrainedOn.read(json.loads(file.read_text(encoding="utf-8")), precision)
    except (ValueError, AttributeError, TypeError) as error:  # as an editor leaves it
        raise SettingsError(f"{FINISHED} is damaged") from error


def _cost(recipe: Recipe) -> tuple[int, float]:
    length = recipe.sequence_length
    return count(recipe.config, length, "parameters"), count(recipe.config, length, "flops") / length


def csv_text(results: Sequence[Result]) -> str:
    """Return one row for each run of a study."""
    columns = (
        "val_loss",
        "train_loss",
        "bits_per_byte",
        "tokens",
        "flops",
        "seconds",
        "parameters",
        "late_max_vio",
        "late_load_vio",
        "even_after",
    )
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("arm", *results[0].run.point, "seed", *columns, "trained_on", "software", "key"))
    for result in results:
        run = result.run
        values = (getattr(result, name) for name in columns)
        where = ("", "") if result.trained_on is None else (result.trained_on, result.trained_on.software)
        writer.writerow((run.arm, *run.point.values(), run.seed, *values, *where, run.key))
    return file.getvalue()
