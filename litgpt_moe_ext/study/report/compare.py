"""Comparison of a study's arms with its control."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from litgpt_moe_ext.study.plan import Study
from litgpt_moe_ext.study.report.analysis import Interval, differences
from litgpt_moe_ext.study.results import Result

_LEVEL, _CONTROL = 0.95, ""


class Difference(NamedTuple):
    """An arm's validation loss minus that of the control at the same place in the grid.

    Attributes:
        alone: The difference, with an interval that holds for this arm by itself.
        together: The difference, with a wider interval such that all intervals of the study hold at once.
        pairs: The difference at each seed that both have.
    """

    alone: Interval
    together: Interval
    pairs: list[float]


def grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results grouped by arm and place in the grid, so that a group's runs differ only by seed."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.run.label, []).append(result)
    return groups


def compared(study: Study, groups: dict[str, list[Result]]) -> dict[str, Difference]:
    """Return the difference of each group except the control's, if they share seeds."""
    arms: dict[str, dict[Hashable, float]] = {}
    for label, group in groups.items():
        # A block is a seed at a place in the grid, so the control is one arm over all places.
        name = _CONTROL if group[0].run.arm == study.control else label
        losses: dict[Hashable, float] = {
            (*map(str, result.run.point.values()), result.run.seed): result.val_loss for result in group
        }
        arms.setdefault(name, {}).update({block: loss for block, loss in losses.items() if math.isfinite(loss)})
    alone = differences(arms, _CONTROL, _LEVEL)
    # Bonferroni: the intervals' error probabilities add up to at most 5 %.
    together = differences(arms, _CONTROL, 1 - (1 - _LEVEL) / max(1, len(alone)))
    control = arms.get(_CONTROL, {})
    pairs = {
        label: [loss - control[block] for block, loss in arms[label].items() if block in control] for label in alone
    }
    return {label: Difference(interval, together[label], pairs[label]) for label, interval in alone.items()}


def comparison(study: Study, groups: dict[str, list[Result]]) -> list[str]:
    """Return lines that say which groups differ from the control."""
    found = compared(study, groups)
    if not any(math.isfinite(difference.alone.low) for difference in found.values()):
        return []
    sure = [label for label, difference in found.items() if _excludes_zero(difference.together)]
    lines = [
        f"Control: {study.control}. Differences are between runs of the same seed; how much of a run is chance is "
        "estimated from all of them together.",
        f"Beyond chance, all {len(found)} comparisons taken together: {'; '.join(sure) or 'none'}."
        if len(found) > 1
        else f"Beyond chance: {'; '.join(sure) or 'no'}.",
    ]
    if weak := [label for label, d in found.items() if _excludes_zero(d.alone) and label not in sure]:
        lines.append(f"Beyond chance if it were the only comparison: {'; '.join(weak)}.")
    return lines


def signed_interval(interval: Interval, digits: int) -> str:
    """Return a difference as text, with its interval if there is one."""
    value, low, high = (f"{number:+.{digits}f}" for number in interval)
    return value if math.isnan(interval.low) else f"{value} ({low} to {high})"


def _excludes_zero(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0
