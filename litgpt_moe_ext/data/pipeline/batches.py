"""Takes documents from the sources, and groups them into batches for encoding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.pipeline.sources import SIDES, Source
from litgpt_moe_ext.data.reading.record import Record

_BATCH_BYTES = 1_000_000


@dataclass(slots=True)
class Batch:
    """Documents that are encoded together.

    Attributes:
        texts: The documents by side.
        sizes: Their bytes.
        empty: Number of empty documents that were skipped.
        first_empty: Where the first of these was.
        source: Index of the source where the next batch starts.
        record: Index of the record in it where the next batch starts.
        position: Bytes read of that source.
    """

    texts: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    empty: int = 0
    first_empty: str = ""
    source: int = 0
    record: int = 0
    position: int = 0


class Intake:
    """Takes documents from sources, up to the limit of each side.

    Args:
        sources: Sources to read, in this order.
        settings: Decides the side of each document, and the limits.

    Attributes:
        offsets: Total bytes of the sources before each one, and of all sources at the end.
    """

    def __init__(self, sources: Sequence[Source], settings: CorpusSettings) -> None:
        self._sources, self._settings = sources, settings
        self.offsets = list(accumulate((source.size for source in sources), initial=0))

    def texts_to_learn_from(self, advance: Callable[[int], None]) -> Iterator[str]:
        """Yield the training documents that a tokenizer is trained on.

        Args:
            advance: Told the bytes read so far.
        """
        # Each source contributes in proportion to its size; without sizes, all contribute equally.
        training = [(index, source) for index, source in enumerate(self._sources) if source.split != "val"]
        total = sum(source.size for _, source in training)
        room = _Room(self._settings.counts, {"train": 0})
        for index, source in training:
            share = source.size / total if total else 1 / len(training)
            left = self._settings.tokenizer_bytes * share
            if room.is_full("train"):
                return
            for record in source.records():
                if self._settings.side_of(source, record.text) == "val" or not record.text.strip():
                    continue
                room.take("train")
                yield record.text
                advance(self.offsets[index] + record.position)
                left -= len(record.text.encode("utf-8"))
                if left <= 0 or room.is_full("train"):
                    break
            source.check()

    def batches(self, first: int, skipped: int, taken: Mapping[str, int]) -> Iterator[Batch]:
        """Yield the documents in batches.

        Args:
            first: Index of the first source.
            skipped: Number of its records to skip.
            taken: Number of documents that each side already has.
        """
        room = _Room(self._settings.counts, taken)
        batch = Batch()
        for index in range(first, len(self._sources)):
            source = self._sources[index]
            sides = SIDES if source.split is None else (source.split,)
            if room.is_full(*sides):
                continue
            for number, record in enumerate(source.records()):
                if index == first and number < skipped:
                    continue
                self._add(batch, source, record, room)
                if sum(batch.sizes.values()) >= _BATCH_BYTES:
                    batch.source, batch.record, batch.position = index, number + 1, record.position
                    yield batch
                    batch = Batch()
                if room.is_full(*sides):
                    break
            source.check()
        batch.source = len(self._sources)
        yield batch

    def _add(self, batch: Batch, source: Source, record: Record, room: "_Room") -> None:
        if not record.text.strip():
            batch.empty += 1
            batch.first_empty = batch.first_empty or f"{source.name}, {record.place}"
        elif not room.is_full(side := self._settings.side_of(source, record.text)):
            room.take(side)
            batch.texts[side].append(record.text)
            batch.sizes[side] += len(record.text.encode("utf-8"))


class _Room:
    """The number of documents that each side can still take."""

    def __init__(self, limits: Mapping[str, int | None], taken: Mapping[str, int]) -> None:
        self._limits = limits
        self._taken = dict(taken)

    def is_full(self, *sides: str) -> bool:
        limits = [(self._taken[side], self._limits.get(side)) for side in sides]
        return all(limit is not None and taken >= limit for taken, limit in limits)

    def take(self, side: str) -> None:
        self._taken[side] += 1
