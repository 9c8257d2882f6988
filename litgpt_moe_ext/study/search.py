"""Searches: settings tried at points spread evenly over their ranges, instead of in every combination.

The points depend only on the study file, so they are runs like all others: several at a time, killed and continued, as
a SLURM array. If more points are asked for later, only the new ones are trained.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from litgpt_moe_ext.study.results import Result

_POINTS = "points"
# With more settings, the first points of Halton's sequence are not spread evenly.
_MOST = 6
_MOST_POINTS = 10_000
_LARGEST = 2**63 - 1


def searched_points(search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the values of the searched settings at each point, each point once.

    Args:
        search: The study file's section: `points`, their number, and for each setting `{low: 1, high: 9}`, with `log:
            true` for a logarithmic range, or a list of values. Integer ends give integers.

    Raises:
        SettingsError: If it is anything else.
    """
    if not search:
        return [{}]
    ranges = {name: values for name, values in search.items() if name != _POINTS}
    count = search.get(_POINTS)
    if type(count) is not int or not 1 <= count <= _MOST_POINTS:
        raise SettingsError(f"search.{_POINTS}: {count} must be the number of points, from 1 to {_MOST_POINTS}")
    if not 1 <= len(ranges) <= _MOST:
        raise SettingsError(f"search: {dict(search)} must have 1 to {_MOST} settings to search, beside {_POINTS}")
    for name, values in ranges.items():
        _check(name, values)
    from scipy.stats.qmc import Halton

    sequence = Halton(len(ranges), scramble=False)
    sequence.fast_forward(1)  # the first point is the lower end of every range
    points = [
        {name: _value(values, float(place)) for (name, values), place in zip(ranges.items(), point, strict=True)}
        for point in sequence.random(count)
    ]
    return list({str(point): point for point in points}.values())  # a short range has fewer


def _check(name: str, values: Any) -> None:
    if isinstance(values, list) and values:
        return
    if not isinstance(values, dict) or not {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        raise SettingsError(f"search.{name}: {values} must be {{low: 1, high: 9, log: true}} or a list of values")
    low, high, log = values["low"], values["high"], values.get("log", False)
    if not isinstance(log, bool):
        raise SettingsError(f"search.{name}.log: {log!r} must be true or false")
    numbers = all(type(end) in (int, float) and abs(end) <= _LARGEST for end in (low, high))
    if not numbers or not low < high or (log and low <= 0):
        raise SettingsError(
            f"search.{name}: {values} must have numbers low < high below 2**63, above 0 where log is true"
        )


def _value(values: Any, place: float) -> Any:
    # The value at a fraction, from 0 to 1, of its range.
    if isinstance(values, list):
        return values[int(place * len(values))]
    low, high = values["low"], values["high"]
    whole = isinstance(low, int) and isinstance(high, int)
    if values.get("log"):
        found = low * (high / low) ** place
        return round(found) if whole else _rounded(found, values, found * math.log(high / low))
    return low + int(place * (high - low + 1)) if whole else _rounded(low + (high - low) * place, values, high - low)


def _rounded(found: float, ends: Mapping[str, float], width: float) -> float:
    # To three digits, or to as many as a narrow range needs: 0.9996 is not 1.
    for digits in range(3, 17):
        value = float(f"{found:.{digits}g}")
        if ends["low"] <= value <= ends["high"] and abs(value - found) <= width / 100:
            return value
    return found


def by_place(searched: Sequence[str], groups: Mapping[str, list["Result"]]) -> dict[str, dict[str, list["Result"]]]:
    """Return a study's groups by the label of what was not searched: arm and place in the grid."""
    places: dict[str, dict[str, list[Result]]] = {}
    for label, group in groups.items():
        run = group[0].run
        others = {name: value for name, value in run.point.items() if name not in searched}
        places.setdefault(replace(run, point=others).label, {})[label] = group
    return places


def best_points(searched: Sequence[str], groups: Mapping[str, list["Result"]]) -> dict[str, list["Result"]]:
    """Return the group with the lowest loss of each arm and place in the grid."""
    best = {}
    for points in by_place(searched, groups).values():
        losses = {label: mean_val_loss(group) for label, group in points.items()}
        # A diverged run has no finite loss.
        label = min(losses, key=lambda label: (math.isnan(losses[label]), losses[label]))
        best[label] = points[label]
    return best


def best_in_words(searched: Sequence[str], groups: Mapping[str, list["Result"]]) -> list[str]:
    """Return a line for each of `best_points`."""
    best, places = best_points(searched, groups).items(), by_place(searched, groups).values()
    lines = [
        f"Lowest of {counted(len(points), 'point')}: {label}, {mean_val_loss(group):.3f}."
        for (label, group), points in zip(best, places, strict=True)
    ]
    return [
        *lines,
        "The lowest of many is partly luck: train it again, with other seeds, beside what it is to replace.",
    ]


def mean_val_loss(group: Sequence["Result"]) -> float:
    """Return the mean validation loss over seeds."""
    return sum(result.val_loss for result in group) / len(group)
