"""What a graph computes, in any order in which a GPU may do it.

A graph starts what was captured on several streams as soon as their events allow. So one replay takes first what was
captured first, the next what was captured last, the third takes it as it falls: what reads memory too early, or writes
to it too early, has other numbers in one of them.
"""

import ctypes
import os
import random
from collections import defaultdict
from collections.abc import Callable


class _Sync(ctypes.Structure):
    """As in `library/streams.c`."""

    _fields_ = [("event", ctypes.c_void_p), ("stream", ctypes.c_void_p), ("waits", ctypes.c_int)]


_gpu = ctypes.CDLL(os.environ["LD_PRELOAD"])
_gpu.null_gpu_syncs.restype = ctypes.c_size_t


class Graph:
    """Computations, and which of them each one waits for.

    Args:
        stream: Handle of the stream on which the capture begins and ends.
    """

    def __init__(self, stream: int) -> None:
        self._computations: list[Callable[[], None]] = []
        self._waits_for: list[set[int]] = []
        self._origin = stream
        # What comes next on a stream, or after an event, waits for these.
        self._last: defaultdict[int, set[int]] = defaultdict(set)
        self._recorded: dict[int, set[int]] = {}
        self._replays = 0

    def add(self, computation: Callable[[], None], stream: int) -> None:
        """Put a computation on a stream."""
        self._follow_events()
        self._waits_for.append(self._last[stream])
        self._last[stream] = {len(self._computations)}
        self._computations.append(computation)

    def _follow_events(self) -> None:
        syncs = ctypes.POINTER(_Sync)()
        for sync in syncs[: _gpu.null_gpu_syncs(ctypes.byref(syncs))]:
            if sync.waits:
                self._last[sync.stream] = self._last[sync.stream] | self._recorded.get(sync.event, set())
            else:
                self._recorded[sync.event] = self._last[sync.stream]

    def end(self) -> None:
        """Refuse what the first stream does not wait for, as CUDA does."""
        self._follow_events()
        awaited, waiting = set(), list(self._last[self._origin])
        while waiting:
            node = waiting.pop()
            if node not in awaited:
                awaited.add(node)
                waiting.extend(self._waits_for[node])
        if len(awaited) < len(self._computations):
            raise RuntimeError("the capture ends before streams that it was not made to wait for")

    @property
    def longest_path(self) -> int:
        """How many computations must be made one after the other."""
        lengths: list[int] = []
        for nodes in self._waits_for:
            lengths.append(1 + max((lengths[node] for node in nodes), default=0))
        return max(lengths, default=0)

    def replay(self) -> None:
        """Make the computations."""
        chance, kind = random.Random(self._replays), self._replays % 3
        self._replays += 1
        choose = (min, max, lambda ready: chance.choice(sorted(ready)))[kind]
        n_awaited = [len(nodes) for nodes in self._waits_for]
        waiting: defaultdict[int, list[int]] = defaultdict(list)
        for node, nodes in enumerate(self._waits_for):
            for other in nodes:
                waiting[other].append(node)
        ready = {node for node, n in enumerate(n_awaited) if n == 0}
        while ready:
            node = choose(ready)
            ready.remove(node)
            self._computations[node]()
            for other in waiting[node]:
                n_awaited[other] -= 1
                if n_awaited[other] == 0:
                    ready.add(other)
