"""Statistics over several runs: intervals over seeds, the compute multiplier, break-even times."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 1000


class Interval(NamedTuple):
    """An estimate with its confidence interval; nan if there are too few values."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent runs and, if all are finite, its 95 % interval by Student's t distribution."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(mean):
        return Interval(mean, float("nan"), float("nan"))
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def differences(arms: Mapping[str, Mapping[Hashable, float]], control: str, level: float = 0.95) -> dict[str, Interval]:
    """Return how much higher each arm is than the control in the same blocks, by least squares.

    The model is a level per arm, plus a level per block, plus noise of equal size in all arms, so every arm contributes
    to the noise estimate of each interval. With two arms this is the paired t test. An arm's own two or three
    differences would not suffice: by chance they are often alike, which makes the interval far too short.

    Args:
        arms: Values by arm and block, such as a seed; arms may lack some blocks.
        control: The arm that the others are compared with.
        level: Confidence of each interval.

    Returns:
        An interval for every other arm that has a block in common with the control.
    """
    from scipy.stats import t

    there = arms.get(control, {})
    others = {name: values for name, values in arms.items() if name != control and not there.keys().isdisjoint(values)}
    if not others:
        return {}
    compared = [there, *others.values()]
    column_of = {block: column for column, block in enumerate(dict.fromkeys(b for values in compared for b in values))}
    rows = [(arm, column_of[block]) for arm, values in enumerate(compared) for block in values]
    values = np.array([value for values in compared for value in values.values()], dtype=float)
    design = np.zeros((len(rows), len(compared) + len(column_of)))
    for row, (arm, block) in enumerate(rows):
        # Levels are relative to the control's, whose own column stays 0.
        design[row, arm], design[row, len(compared) + block] = float(arm > 0), 1.0
    inverse = np.linalg.pinv(design.T @ design)
    fitted = inverse @ design.T @ values
    freedom = len(rows) - int(np.linalg.matrix_rank(design))
    half = np.full(len(compared), np.nan)
    if freedom > 0:
        noise = float(((values - design @ fitted) ** 2).sum()) / freedom
        half = t.ppf((1 + level) / 2, freedom) * np.sqrt(noise * np.diag(inverse)[: len(compared)])
    bounds = {name: (float(fitted[arm]), float(half[arm])) for arm, name in enumerate(others, start=1)}
    return {name: Interval(by, by - by_half, by + by_half) for name, (by, by_half) in bounds.items()}


def compute_multiplier(dense: Sequence[tuple[float, float]], moe: Sequence[tuple[float, float]]) -> Interval:
    """Return how many times the MoE runs' FLOPs the dense models need for the same loss.

    A power law, `loss = a FLOPs^-b`, is fitted to the dense runs. The multiplier is the geometric mean over the MoE
    runs, the interval the middle 95 % of a bootstrap over runs.

    Args:
        dense: FLOPs and loss of each dense run, at two budgets or more.
        moe: FLOPs and loss of each MoE run.

    Raises:
        ValueError: If the dense runs have only one budget, or do not improve with compute.
    """
    generator = np.random.default_rng(0)
    dense_log, moe_log = np.log(np.array(dense, dtype=float)), np.log(np.array(moe, dtype=float))
    value = _multiplier(dense_log, moe_log)
    if not np.isfinite(value):
        raise ValueError("dense: must be runs of two budgets or more whose loss falls with compute")
    drawn = []
    for _ in range(_RESAMPLES):
        sample = _multiplier(*(runs[generator.integers(len(runs), size=len(runs))] for runs in (dense_log, moe_log)))
        drawn += [sample] if np.isfinite(sample) else []
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (np.nan, np.nan)
    return Interval(float(np.exp(value)), float(np.exp(low)), float(np.exp(high)))


def _multiplier(dense_log: np.ndarray, moe_log: np.ndarray) -> float:
    if np.ptp(dense_log[:, 0]) == 0:
        return float("nan")
    slope, offset = np.polyfit(dense_log[:, 0], dense_log[:, 1], 1)
    if slope >= 0:
        return float("nan")
    return float(np.mean((moe_log[:, 1] - offset) / slope - moe_log[:, 0]))


def break_even(dense: tuple[np.ndarray, np.ndarray], moe: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Return the time from which on the MoE's loss is no higher than the dense model's at equal time.

    Args:
        dense: Seconds, ascending, and losses of the dense model.
        moe: Seconds, ascending, and losses of the MoE model.

    Returns:
        Seconds; None if that never happens within the time that both have.
    """
    end = min(dense[0][-1], moe[0][-1])
    begin = max(dense[0][0], moe[0][0])
    times = np.unique(np.concatenate([dense[0], moe[0]]))
    times = times[(times >= begin) & (times <= end)]
    if not len(times):
        return None
    worse = np.interp(times, *moe) > np.interp(times, *dense)
    if worse[-1]:
        return None
    return float(times[np.flatnonzero(worse)[-1] + 1] if worse.any() else times[0])


def first_below(values: np.ndarray, limit: float) -> int | None:
    """Return the index from which on all values are at most `limit`; None if there is none."""
    above = np.flatnonzero(~(values <= limit))
    index = int(above[-1]) + 1 if len(above) else 0
    return index if index < len(values) else None
