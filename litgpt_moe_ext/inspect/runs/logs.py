"""Training runs, read from their CSV logs."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.pictures.expert_load import loads_by_layer
from litgpt_moe_ext.training.logs import WIDE_FILE
from litgpt_moe_ext.wording import quoted

TOKENS = "total_tokens"
COLUMNS = ("run", "tokens", "loss", "val loss", "MaxVio", "grad norm", "tok/s")
# Metrics of the columns between the first and the last, and how their numbers are written.
_METRICS = ((TOKENS, ",.0f"), ("loss", ".4f"), ("val_loss", ".4f"), ("moe/max_vio", ".3f"), ("grad_norm", ".3f"))


@dataclass(frozen=True)
class RunLog:
    """What a run logged.

    Attributes:
        name: Name of the run.
        columns: By metric, one float per log line: nan if the line lacks it, infinity if it has nan. Lines are in the
            order of `total_tokens`.
    """

    name: str
    columns: dict[str, np.ndarray]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and values of the lines that have the metric `name`; both empty if none has."""
        values = self.columns.get(name, np.array([]))
        there = ~np.isnan(values)
        return self.columns[TOKENS][: len(values)][there], values[there]

    def tokens_per_second(self) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and training speed: as logged, or from the iteration time, which excludes validation."""
        if "tokens_per_second" in self.columns:
            return self.series("tokens_per_second")
        if not {"iter", "iter_time"} <= set(self.columns):
            return np.array([]), np.array([])
        tokens, iteration, seconds = (self.columns[name] for name in (TOKENS, "iter", "iter_time"))
        with np.errstate(divide="ignore", invalid="ignore"):
            speed = tokens / iteration / seconds
        there = np.isfinite(speed)
        return tokens[there], speed[there]

    def expert_load(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Return the optimizer steps, and by layer the load of each expert over the mean, (experts, lines).

        Empty where the log does not say them.
        """
        found = loads_by_layer(self.columns)
        if not found or "step" not in self.columns:
            return np.array([]), {}
        there = ~np.isnan(next(iter(found.values()))[0])
        return self.columns["step"][there], {layer: np.stack(loads)[:, there] for layer, loads in found.items()}


def load_run(directory: Path, name: str | None = None) -> RunLog:
    """Read the logs of a run: its wide table, or the merged parts of LitGPT's own CSV logs.

    If a later part of LitGPT's logs repeats steps of an earlier one, the later counts.

    Args:
        directory: The run's `out_dir`.
        name: Name of the run. Default: the name of the directory.

    Raises:
        SettingsError: If there are no CSV logs, they cannot be read, or they lack token counts.
    """
    paths = [directory / WIDE_FILE]
    if not paths[0].is_file():
        found = {path.parent.name.partition("_")[2]: path for path in directory.glob("logs/csv/version_*/metrics.csv")}
        paths = [found[number] for number in sorted(filter(str.isdecimal, found), key=int)]
    if not paths:
        run = directory.parent
        hint = f"did you mean {run}?" if (run / WIDE_FILE).is_file() else "name a run trained with logger_name: csv"
        raise SettingsError(f"run_dirs: {quoted(directory)} must be the out_dir of a run, with {WIDE_FILE}; {hint}")
    rows: list[dict[str, float]] = []
    for path in paths:
        part = _read(path)
        if part:
            rows = [row for row in rows if row[TOKENS] < part[0][TOKENS]] + part
    if not rows:
        raise SettingsError(
            f"run_dirs: {quoted(directory)} must have logged a line with {TOKENS}; train for at least one log interval"
        )
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    return RunLog(name or directory.name, columns)


def last_values(log: RunLog) -> tuple[str, ...]:
    """Return the texts of a run for `COLUMNS`: the last value of each metric, and the median speed."""
    cells = [f"{values[-1]:{form}}" if len(values := log.series(metric)[1]) else "-" for metric, form in _METRICS]
    speed = log.tokens_per_second()[1]
    return (log.name, *cells, f"{np.sort(speed)[len(speed) // 2]:,.0f}" if len(speed) else "-")


def distinct_names(directories: Sequence[Path]) -> list[str]:
    """Return the names of the directories, with as many of their parents as it takes to tell them apart."""
    resolved = [directory.resolve() for directory in directories]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]


def _read(path: Path) -> list[dict[str, float]]:
    # LitGPT's validation lines have no token count: use that of the preceding training line.
    rows: list[dict[str, float]] = []
    tokens = math.nan
    try:
        with open(path, newline="", encoding="utf-8") as file:
            # A kill, a full disk, or a run that is writing cuts the last line off, perhaps within a number.
            whole = file.read().rpartition("\n")[0]
        for fields in csv.DictReader(io.StringIO(whole)):
            row = {name: number for name, text in fields.items() if (number := _number(text)) is not None}
            tokens = row.setdefault(TOKENS, tokens)
            if math.isfinite(tokens):
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingsError(f"run_dirs: {path} cannot be read ({reason}); copy it again") from error
    return sorted(rows, key=lambda row: row[TOKENS])


def _number(text: str | list[str] | None) -> float | None:
    # Values beyond the last column are a list. A nan in the file becomes infinity, as nan here means a gap.
    try:
        number = float(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return math.inf if number is not None and math.isnan(number) else number
