"""Which documents are taken out of the sources, and in which batches they are encoded."""

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
        empty: Number of empty documents on the way.
        first_empty: Where the first of these was.
        source: Index of the source in which the next batch starts.
        record: Record of it with which the next batch starts.
        position: Bytes of that source that are read.
    """

    texts: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    empty: int = 0
    first_empty: str = ""
    source: int = 0
    record: int = 0
    position: int = 0


class Intake:
    """Takes documents out of sources, as many as each side may have.

    Args:
        sources: What to read, in this order.
        settings: What says which side a document is on, and how many each takes.

    Attributes:
        offsets: Bytes of all sources before each one, and at the end of all.
    """

    def __init__(self, sources: Sequence[Source], settings: CorpusSettings) -> None:
        self._sources, self._settings = sources, settings
        self.offsets = list(accumulate((source.size for source in sources), initial=0))

    def texts_to_learn_from(self, advance: Callable[[int], None]) -> Iterator[str]:
        """Yield the training documents that a tokenizer is trained on.

        Args:
            advance: Told the bytes read so far.
        """
        # The share of each source is that of its size; without sizes all sources count the same.
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
            first: Index of the source to begin in.
            skipped: Records of it to pass over.
            taken: Documents that each side has already.
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
    """How many documents each side still takes."""

    def __init__(self, limits: Mapping[str, int | None], taken: Mapping[str, int]) -> None:
        self._limits = limits
        self._taken = dict(taken)

    def is_full(self, *sides: str) -> bool:
        limits = [(self._taken[side], self._limits.get(side)) for side in sides]
        return all(limit is not None and taken >= limit for taken, limit in limits)

    def take(self, side: str) -> None:
        self._taken[side] += 1
