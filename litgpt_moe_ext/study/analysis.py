"""What the numbers of several runs say: intervals over seeds, the compute multiplier, break-even times."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with its confidence interval; nan where there are too few values for one."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent runs and its interval by Student's t distribution."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def compute_multiplier(
    dense: Sequence[tuple[float, float]], moe: Sequence[tuple[float, float]], resamples: int = 1000
) -> Interval:
    """Return how many times the FLOPs of the MoE runs the dense family needs for the same loss.

    A power law, `loss = a FLOPs^-b`, is fitted to the dense runs; the multiplier is the geometric mean over the MoE
    runs, the interval the middle 95 % of the bootstrap over runs.

    Args:
        dense: FLOPs and loss of each dense run, at two budgets or more.
        moe: FLOPs and loss of each MoE run.
        resamples: Number of resamples.

    Raises:
        ValueError: If the dense runs have one budget only, or do not get better with compute.
    """
    generator = np.random.default_rng(0)
    dense_log, moe_log = np.log(np.array(dense, dtype=float)), np.log(np.array(moe, dtype=float))
    value = _multiplier(dense_log, moe_log)
    if not np.isfinite(value):
        raise ValueError("dense: must be runs of two budgets or more whose loss falls with compute")
    drawn = []
    for _ in range(resamples):
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
    """Return the time from which on the MoE has no higher loss than the dense model at equal time.

    Args:
        dense: Seconds, ascending, and losses.
        moe: The same of the MoE model.

    Returns:
        Seconds; None if it is never so, within the time that both have.
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
