"""A study as one page: its question, the arms' results over seeds, curves, balance, and the raw numbers."""

import base64
import csv
import html
import io
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from litgpt_moe_ext.inspect.pages import page, picture, table, words
from litgpt_moe_ext.pictures.style import png
from litgpt_moe_ext.study.plan import BUDGET, Study
from litgpt_moe_ext.study.report.analysis import Interval, break_even, compute_multiplier, mean_interval
from litgpt_moe_ext.study.report.compare import compared, comparison, grouped, signed_interval
from litgpt_moe_ext.study.report.figures import (
    balance_figure,
    difference_figure,
    loss_figure,
    mean,
    search_figure,
    smooth,
)
from litgpt_moe_ext.study.results import MAX_VIO, Result, csv_text
from litgpt_moe_ext.study.search import best_in_words, best_points
from litgpt_moe_ext.wording import counted

COLUMNS = (
    "arm", "seeds", "validation loss", "range", "95 % interval", "minus control (95 % interval)", "training loss, end",
    "bits per byte", "tokens", "training FLOPs", "seconds", "MaxVio, end", "of mean load", "MaxVio <= 0.1 after",
)  # fmt: skip
# Lines about unfinished runs on a page.
_MOST_LINES = 20
_CURVES = (
    "Mean over seeds of the training loss, smoothed, without its steep start; dots are validations. The table has the "
    "mean training loss of the last fifth of a run: where it is far below the validation loss, the model learns its "
    "corpus by heart."
)
_DIFFERENCES = (
    "Thick: 95 % interval of one comparison. Thin: all of them hold together with 95 %. Grey: each seed's difference."
)
_SEARCH = (
    "Mean validation loss over each setting that was searched; a colour for each arm and place in the grid. The "
    "figures below are of the lowest ones."
)
_BALANCE = (
    "Largest load of an expert over the mean, minus 1, in the worst layer; mean and range over seeds. Dotted: 0.1. "
    "The table has it twice, over the last fifth of a run: of each step, and of the mean load, where chance is gone."
)


def study_page(study: Study, results: Sequence[Result], missing: Sequence[str], command: str) -> str:
    """Return the page in HTML.

    Args:
        study: The study.
        results: Its finished runs.
        missing: A line for each unfinished run.
        command: The command that repeats the study.
    """
    notes = [study.question, f"Repeat it: {command}"]
    if missing:
        number = f"{len(missing)} of {counted(len(study.runs), 'run')}"
        notes.append(f"Not finished, and left out of all that follows: {number}; the same command goes on.")
        notes += missing[:_MOST_LINES]
        notes += [f"And {len(missing) - _MOST_LINES} more."] if len(missing) > _MOST_LINES else []
    groups = grouped(results)
    notes += trained_on(results)
    parts = [*(f"<p>{words(note)}</p>" for note in notes if note), table(*_shown(rows(study, groups)))]
    parts += [f"<p>{words(line)}</p>" for line in verdicts(study, results)]
    if found := compared(study, groups):
        parts.append(picture("Differences", _DIFFERENCES, png(difference_figure(found))))
    if study.searched:
        parts.append(picture("Search", _SEARCH, png(search_figure(study.searched, groups))))
    drawn = best_points(study.searched, groups) if study.searched else groups
    parts.append(picture("Loss", _CURVES, png(loss_figure(drawn))))
    if any(len(result.log.series(MAX_VIO)[1]) for group in drawn.values() for result in group):
        parts.append(picture("Balance", _BALANCE, png(balance_figure(drawn))))
    text = csv_text(results)
    data = base64.b64encode(text.encode()).decode("ascii")
    name = html.escape(study.name)
    link = f'<a download="{name}.csv" href="data:text/csv;base64,{data}">{name}.csv</a>'
    columns, *cells = csv.reader(io.StringIO(text))
    said = [i for i, name in enumerate(columns) if name not in ("trained_on", "software")]  # elsewhere on the page
    short = [[_shortened(row[i]) for i in said] for row in cells]
    parts += [f"<h2>Runs</h2><p>{link}</p>", table([columns[i] for i in said], short)]
    parts += [f"<p>{words(line)}</p>" for line in trained_with(results)]
    return page(f"Study: {study.name}", parts)


def trained_on(results: Sequence[Result]) -> list[str]:
    """Return a line for each kind of place where runs were trained, and one if their times are meaningless."""
    kinds = Counter(str(result.trained_on) for result in results if result.trained_on is not None)
    lines = []
    for kind, number in kinds.items():
        share = f" ({counted(number, 'run')})" if len(kinds) > 1 else ""
        lines.append(f"Trained on: {kind}{share}.")
    if not all(result.timed for result in results):
        lines.append("Runs that shared a device slowed each other down, so no seconds are shown for them.")
    if len(trained_with(results)) > 1:
        lines.append("Not all runs were trained with the same code; the foot of this page says with which.")
    return lines


def trained_with(results: Sequence[Result]) -> list[str]:
    """Return a line for each version of the code that trained a run."""
    kinds = Counter(result.trained_on.software if result.trained_on else "" for result in results)
    return [
        f"Trained with {kind or 'a version that was not recorded'}: {counted(number, 'run')}."
        for kind, number in kinds.items()
    ]


def rows(study: Study, groups: dict[str, list[Result]]) -> list[tuple[str, ...]]:
    """Return the cells of `COLUMNS` for each group."""
    against = compared(study, groups)
    cells = {label: signed_interval(found.alone, 3) for label, found in against.items()}
    controls = {label for label, group in groups.items() if against and group[0].run.arm == study.control}
    return [
        _row(label, group, cells.get(label, "control" if label in controls else "-")) for label, group in groups.items()
    ]


def verdicts(study: Study, results: Sequence[Result]) -> list[str]:
    """Return the study's conclusions: arms that differ from the control, compute multiplier, break-even time."""
    groups = grouped(results)
    lines = comparison(study, groups) + (best_in_words(study.searched, groups) if study.searched else [])
    if sides := study.compare:
        moe, dense = ([result for result in results if result.run.arm == sides[side]] for side in ("moe", "dense"))
        lines += [*_by_flops(moe, dense), *_by_seconds(moe, dense)]
    return lines


def _by_flops(moe: Sequence[Result], dense: Sequence[Result]) -> list[str]:
    # A diverged run has no finite loss.
    costs, reached = ([(r.flops, r.val_loss) for r in side if math.isfinite(r.val_loss)] for side in (dense, moe))
    if len({result.run.point.get(BUDGET) for result in dense}) < 2 or not (costs and reached):
        return []
    try:
        found = compute_multiplier(costs, reached)
    except ValueError as error:
        return [f"No compute multiplier: {error}."]
    return [
        f"Compute multiplier {_interval(found, 2)}: the dense family needs so many times the training FLOPs for the "
        "MoE's loss."
    ]


def _by_seconds(moe: Sequence[Result], dense: Sequence[Result]) -> list[str]:
    if not (moe and dense and all(result.timed for result in (*moe, *dense))):
        return []
    largest = max(result.tokens for result in moe)
    sides = [_mean_over_seconds([r for r in side if r.tokens == largest]) for side in (dense, moe)]
    if not all(np.isfinite(seconds[-1:]).any() and np.isfinite(losses).all() for seconds, losses in sides):
        return []
    even = break_even(*sides)
    when = "is never ahead within the run" if even is None else f"is ahead from {even:,.0f} s on"
    return [f"In seconds, the MoE {when} (training loss, on the machine that trained both)."]


def _shown(cells: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    # Only columns with values, and numbers that do not break over lines.
    said = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in cells)]
    return [COLUMNS[i] for i in said], [
        [row[0], *(row[i].replace(" ", "\N{NO-BREAK SPACE}") for i in said[1:])] for row in cells
    ]


def _row(label: str, group: Sequence[Result], difference: str) -> tuple[str, ...]:
    losses = [result.val_loss for result in group]
    interval = mean_interval(losses)
    even = [result.even_after for result in group]
    return (
        label,
        str(len(group)),
        f"{interval.value:.3f}",
        f"{np.min(losses):.3f} to {np.max(losses):.3f}",  # nan if any loss is
        "-" if math.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}",
        difference,
        _number(float(np.mean([result.train_loss for result in group])), ".3f"),
        _number(float(np.mean([result.bits_per_byte for result in group])), ".3f"),
        f"{group[0].tokens:,.0f}",
        f"{group[0].flops:.2e}",
        _number(float(np.mean([result.seconds if result.timed else math.nan for result in group])), ",.0f"),
        _number(float(np.mean([result.late_max_vio for result in group])), ".2f"),
        _number(float(np.mean([result.late_load_vio for result in group])), ".2f"),
        _number(float(np.mean(even)), ",.0f"),
    )


def _shortened(cell: str) -> str:
    return f"{float(cell):.6g}" if re.fullmatch(r"-?\d+\.\d+(e[+-]\d+)?", cell) else cell


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _interval(interval: Interval, digits: int) -> str:
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _mean_over_seconds(group: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    curves = [result.curve("loss") for result in group]
    return mean([(curve.seconds, smooth(curve.values)) for curve in curves])
