"""The time that there is, of which each table has its share."""

import time


class Budget:
    """Says when nothing new is to be begun.

    Args:
        minutes: For all tables.
    """

    def __init__(self, minutes: float) -> None:
        self._end = self._end_of_table = time.monotonic() + 60 * minutes

    @property
    def is_spent(self) -> bool:
        return time.monotonic() > min(self._end, self._end_of_table)

    @property
    def minutes_left(self) -> float:
        return (self._end - time.monotonic()) / 60

    def begin_table(self, share: float) -> None:
        """Give the next table a share of the time that is left."""
        now = time.monotonic()
        self._end_of_table = now + (self._end - now) * share
