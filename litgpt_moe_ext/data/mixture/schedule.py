"""The corpus of each row of a mixture, as a pure function of the row's number.

Rows are dealt out, not drawn. After any number of rows n, a corpus with share p has had between n * p - 1 and n * p + 1
of them: the order is Tijdeman's for the chairman assignment problem (Discrete Mathematics 32, 1980), which always stays
within 1 - 1 / (2 * corpora - 2) rows of every share. Shares are whole numbers of rows in a period, so the order repeats
and a table of one period suffices for any row; the only state is the number of the next row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Shares that need a longer period are rounded to multiples of 1 in so many rows.
LONGEST_PERIOD = 1 << 16


def whole_shares(shares: Sequence[Fraction]) -> list[int]:
    """Return whole numbers in the proportion of the shares, with a sum of at most about `LONGEST_PERIOD`.

    They are exact if possible. Otherwise the largest remainders are rounded up, and zeros from rounding become one,
    which may increase the sum. No share changes by more than the number of shares / `LONGEST_PERIOD`.

    Args:
        shares: At least one, none negative, not all zero.
    """
    total = sum(shares)
    parts = [share / total for share in shares]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= LONGEST_PERIOD:
        return [int(part * period) for part in parts]
    whole = [max(math.floor(part * LONGEST_PERIOD), int(part > 0)) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda index: whole[index] - parts[index] * LONGEST_PERIOD)
    for index in by_remainder[: max(LONGEST_PERIOD - sum(whole), 0)]:
        whole[index] += 1
    return whole


class Schedule:
    """The order of the corpora for fixed shares.

    Args:
        shares: Rows of each corpus in a period, as from `whole_shares`.

    Attributes:
        shares: As given, int64, shape (corpora,).
        period: Number of rows after which the order repeats.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self.shares = np.array(shares, np.int64)
        self.period = int(self.shares.sum())
        self._corpora = _chairmen(shares)
        taken = self._corpora[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(taken, axis=0)])

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows come from each corpus, int64, shape (corpora,)."""
        periods, rest = divmod(rows, self.period)
        return periods * self.shares + self._before[rest]

    def look_up(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpus of each row, and the number of that corpus' rows before it.

        Args:
            rows: Row numbers from 0, int64, shape (N,).

        Returns:
            Two int64 arrays of shape (N,).
        """
        periods, rest = np.divmod(rows, self.period)
        corpora = self._corpora[rest]
        return corpora, periods * self.shares[corpora] + self._before[rest, corpora]


def _chairmen(shares: Sequence[int]) -> np.ndarray:
    """Return the corpus of each row of a period: among those eligible, the one with the earliest deadline."""
    period, present = sum(shares), [index for index, share in enumerate(shares) if share]
    slack = max(2 * len(present) - 2, 1)
    owed = dict.fromkeys(present, 0)  # how far a corpus is behind its share, in rows times the period
    order = np.empty(period, np.int64)
    for row in range(period):
        best, wait = -1, 0  # the deadline is wait / share rows away, compared without dividing
        for index in present:
            owed[index] += shares[index]
            if slack * owed[index] < period and len(present) > 1:
                continue
            longest = (slack - 1) * period - slack * owed[index]
            if best < 0 or longest * shares[best] < wait * shares[index]:
                best, wait = index, longest
        owed[best] -= period
        order[row] = best
    return order


@dataclass(frozen=True)
class Phases:
    """A schedule, and optionally another one from some row on.

    Attributes:
        first: The order from row 0 on.
        second: The order during the annealing, or None.
        border: The first row of the annealing.
    """

    first: Schedule
    second: Schedule | None = None
    border: int = 0

    def counts(self, rows: int) -> np.ndarray:
        """See `Schedule.counts`."""
        if self.second is None or rows <= self.border:
            return self.first.counts(rows)
        return self.first.counts(self.border) + self.second.counts(rows - self.border)

    def look_up(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Schedule.look_up`."""
        if self.second is None:
            return self.first.look_up(rows)
        corpora, before = self.first.look_up(rows)
        late = np.flatnonzero(rows >= self.border)
        corpora[late], since = self.second.look_up(rows[late] - self.border)
        before[late] = self.first.counts(self.border)[corpora[late]] + since
        return corpora, before
