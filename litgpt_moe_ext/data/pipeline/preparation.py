"""Preparing a corpus of any size out of sources: tokenizer, shards, manifest.

The documents are read as one stream, encoded by several processes and written in order, so the result does not depend
on their number. Unfinished work is kept in `<root>/.<key>.unfinished`; its state names the document up to which the
shards hold everything, and the next run with the same key goes on there. The key covers the content of all sources and
every setting, so nothing stale is ever continued or used. A lock lets one process at a time work on a corpus.
"""

import errno
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from litgpt_moe_ext.data.pipeline.encoding import Encoder, encode_in_order
from litgpt_moe_ext.data.pipeline.progress import PreparationProgress
from litgpt_moe_ext.data.pipeline.readers import Record
from litgpt_moe_ext.data.pipeline.shards import token_dtype, write_shard
from litgpt_moe_ext.data.pipeline.sources import SIDES, Source, identities
from litgpt_moe_ext.data.pipeline.store import (
    MANIFEST,
    STATE,
    TOKENIZER_DIR,
    cache_key,
    check_root,
    in_validation,
    open_corpus,
    publish,
    read_manifest,
    unigram_loss,
    write_manifest,
)
from litgpt_moe_ext.data.pipeline.tokenizer import (
    BPESettings,
    open_for_documents,
    require_bos,
    require_eos,
    train_bpe,
    vocabulary_size,
)
from litgpt_moe_ext.data.pipeline.tokenizer_files import tokenizer_hash, write_tokenizer
from litgpt_moe_ext.durable import flush, flush_tree
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.machine import count_cores

_BATCH_BYTES = 1_000_000
# Below this the threads of the tokenizers library are as fast: encoding is 97% of the work, and starting a process
# takes as long as encoding a megabyte.
_SMALL_BYTES = 32_000_000
_NAMED_SOURCES = 100  # in a manifest
_LARGE_SHARE = 0.3  # of documents that validate: more is hardly meant


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What shapes a corpus besides its documents.

    Attributes:
        tokenizer: The files of a tokenizer (`litgpt_moe_ext.data.pipeline.tokenizer_files`), or settings to train one.
        prepend_bos: Whether each document starts with the BOS token; each ends with EOS.
        val_fraction: Share of the documents of sources without a split that validate, by a hash of their text: equal
            texts are on the same side.
        seed: Decides which.
        counts: How many documents to take at most, the first, by side; None or missing: all.
        reading: How the sources were read, as JSON values.
        tokenizer_bytes: Text to train a tokenizer on; of larger corpora, the beginning of every source is taken.
        shard_tokens: Tokens after which a shard is written and an interrupted preparation can continue.
    """

    tokenizer: Mapping[str, bytes] | BPESettings
    prepend_bos: bool = False
    val_fraction: float = 0.0
    seed: int = 42
    counts: Mapping[str, int | None] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_bytes: int = 1_000_000_000
    shard_tokens: int = 100_000_000

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        if isinstance(self.tokenizer, BPESettings):
            values["tokenizer"] = asdict(self.tokenizer)
        else:
            values["tokenizer"] = tokenizer_hash(dict(self.tokenizer))
        values["counts"] = {side: self.counts.get(side) for side in SIDES}
        return values


@dataclass(slots=True)
class _State:
    """How much of the stream the shards hold.

    Attributes:
        source: Index of the source to go on with.
        record: Records of it that are done with.
        shards: Number of shards by split.
        counts: What the manifest counts.
        first_empty: Where the first empty document was.
    """

    source: int = 0
    record: int = 0
    shards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    counts: dict[str, int] = field(
        default_factory=lambda: {
            "documents_empty": 0,
            **{f"{what}_{split}": 0 for what in ("documents", "bytes", "tokens") for split in SIDES},
        }
    )
    first_empty: str = ""


@dataclass(slots=True)
class _Batch:
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


def prepare_corpus(
    data_path: Path,
    sources: Sequence[Source],
    settings: CorpusSettings,
    workers: int | None = None,
    verbose: bool = True,
) -> Path:
    """Prepare a corpus unless it is there already, and return its folder `<data_path>/<key>`.

    Safe to call from several processes at once (one works, the others wait) and to interrupt at any moment.

    Args:
        data_path: Folder of all prepared corpora.
        sources: What to read, in this order.
        settings: What else shapes the result.
        workers: Processes that encode; None takes one per core (a small corpus: one, with a thread per core).
        verbose: Whether to show progress, and to print a line also when there is nothing to do.

    Raises:
        SettingsError: A setting cannot work, a source is damaged, a finished corpus was, or the disk is full. What is
            done is kept.
    """
    _check(sources, settings, workers)
    corpus = hashlib.sha256(json.dumps(identities(sources)).encode()).hexdigest()
    directory = data_path / cache_key(corpus, settings.to_json())
    if (manifest := read_manifest(directory)) is not None:
        if verbose:
            print(f"Reusing the corpus in {directory} ({_summary(manifest)})", flush=True)
        return directory
    check_root(directory.parent)
    with _only_one(directory, verbose):
        if read_manifest(directory) is None:  # another process may have finished meanwhile
            if directory.exists():
                raise SettingsError(
                    f"data_path: {directory} exists but is not a finished corpus (it has no {MANIFEST}); move or "
                    "delete it, then run again"
                )
            preparation = _Preparation(directory, sources, settings, {"corpus_sha256": corpus}, verbose)
            preparation.run(_workers(sources, workers))
    return directory


class _Preparation:
    """One run of the preparation of one corpus, which may continue an earlier one."""

    def __init__(
        self, directory: Path, sources: Sequence[Source], settings: CorpusSettings, facts: dict[str, Any], verbose: bool
    ) -> None:
        self.final = directory
        self.directory = directory.with_name(f".{directory.name}.unfinished")
        self.sources = sources
        self.settings = settings
        self.facts = facts
        self.verbose = verbose
        self.offsets = list(accumulate((source.size for source in sources), initial=0))
        self.state = _State()
        self.buffers: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}

    def run(self, workers: int) -> None:
        started = time.perf_counter()
        with PreparationProgress(self.offsets[-1], self.verbose) as progress:
            self._begin(progress)
            tokenizer_dir = self.directory / TOKENIZER_DIR
            tokenizer = open_for_documents(tokenizer_dir)
            vocab_size = vocabulary_size(tokenizer)
            encoder = Encoder(
                tokenizer.to_str(),
                require_eos(tokenizer_dir),
                require_bos(tokenizer_dir) if self.settings.prepend_bos else None,
                token_dtype(vocab_size),
            )
            progress.stage("encoding", self.offsets[self.state.source])
            batches = encode_in_order(encoder, self._batches(), lambda batch: tuple(batch.texts.values()), workers)
            for batch, arrays in batches:
                self._take(batch, arrays)
                progress.update(self.offsets[batch.source] + batch.position)
                if max(sum(map(len, buffer)) for buffer in self.buffers.values()) >= self.settings.shard_tokens:
                    self._commit(vocab_size)
            self._commit(vocab_size)
        manifest = self._finish(vocab_size, encoder)
        seconds = time.perf_counter() - started
        print(f"Prepared a corpus in {self.final} ({_summary(manifest)}, {seconds:.1f} s)", flush=True)
        if manifest["documents_empty"]:
            print(f"Left out {manifest['documents_empty']} empty document(s), the first at {manifest['first_empty']}")
        if repeated := len(self.sources) - len({source.identity for source in self.sources}):
            print(f"{repeated} source(s) have the content of another one and count twice; remove them to read it once")
        share = manifest["documents_val"] / (manifest["documents_train"] + manifest["documents_val"])
        if share > _LARGE_SHARE:
            print(f"{share:.0%} of the documents validate; set val_count, or name other files, to validate on fewer")

    def _begin(self, progress: PreparationProgress) -> None:
        """Continue what is there, or starts with the tokenizer."""
        try:
            self.state = _State(**json.loads((self.directory / STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            self._start(progress)
        else:
            tokens = self.state.counts["tokens_train"]
            print(f"Continuing in {self.directory}: {tokens:,} training tokens are there", flush=True)
        for split in SIDES:  # what was written after the state: its documents come again
            for path in sorted(self.directory.glob(f"{split}_*.bin"))[self.state.shards[split] :]:
                path.unlink()

    def _start(self, progress: PreparationProgress) -> None:
        with _writing(self.final.parent):
            self.directory.mkdir(exist_ok=True)
            tokenizer_dir = self.directory / TOKENIZER_DIR
            if isinstance(self.settings.tokenizer, BPESettings):
                progress.stage("training tokenizer")
                train_bpe(self._texts_to_learn_from(progress), self.settings.tokenizer, tokenizer_dir)
            else:
                write_tokenizer(dict(self.settings.tokenizer), tokenizer_dir)
            flush_tree(tokenizer_dir)
            self._save_state()

    def _texts_to_learn_from(self, progress: PreparationProgress) -> Iterator[str]:
        # The share of each source is that of its size; without sizes all sources count the same.
        training = [(index, source) for index, source in enumerate(self.sources) if source.split != "val"]
        total = sum(source.size for _, source in training)
        room = _Room(self.settings.counts, {"train": 0})
        for index, source in training:
            share = source.size / total if total else 1 / len(training)
            left = self.settings.tokenizer_bytes * share
            if room.is_full("train"):
                return
            for record in source.records():
                if self._side(source, record.text) == "val" or not record.text.strip():
                    continue
                room.take("train")
                yield record.text
                progress.update(self.offsets[index] + record.position)
                left -= len(record.text)
                if left <= 0 or room.is_full("train"):
                    break

    def _side(self, source: Source, text: str) -> str:
        if source.split is not None:
            return source.split
        return "val" if in_validation(text, self.settings.val_fraction, self.settings.seed) else "train"

    def _batches(self) -> Iterator[_Batch]:
        """Read on from where the state stands."""
        first, skipped = self.state.source, self.state.record
        room = _Room(self.settings.counts, {side: self.state.counts[f"documents_{side}"] for side in SIDES})
        batch = _Batch()
        for index in range(first, len(self.sources)):
            source = self.sources[index]
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
                    batch = _Batch()
                if room.is_full(*sides):
                    break
        batch.source = len(self.sources)
        yield batch

    def _add(self, batch: _Batch, source: Source, record: Record, room: "_Room") -> None:
        if not record.text.strip():
            batch.empty += 1
            batch.first_empty = batch.first_empty or f"{source.name}, {record.place}"
        elif not room.is_full(side := self._side(source, record.text)):
            room.take(side)
            batch.texts[side].append(record.text)
            batch.sizes[side] += len(record.text.encode("utf-8"))

    def _take(self, batch: _Batch, arrays: tuple[np.ndarray, ...]) -> None:
        state = self.state
        for split, array in zip(SIDES, arrays, strict=True):
            if len(array):
                self.buffers[split].append(array)
            state.counts[f"documents_{split}"] += len(batch.texts[split])
            state.counts[f"bytes_{split}"] += batch.sizes[split]
            state.counts[f"tokens_{split}"] += len(array)
        state.counts["documents_empty"] += batch.empty
        state.first_empty = state.first_empty or batch.first_empty
        state.source, state.record = batch.source, batch.record

    def _commit(self, vocab_size: int) -> None:
        """Write what is buffered, and then that it is there."""
        with _writing(self.final.parent):
            for side, buffer in self.buffers.items():
                if buffer:
                    path = self.directory / f"{side}_{self.state.shards[side]:05}.bin"
                    write_shard(path, np.concatenate(buffer), vocab_size)
                    self.state.shards[side] += 1
                    buffer.clear()
            self._save_state()

    def _save_state(self) -> None:
        partial = self.directory / f".{STATE}.partial"
        partial.write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        flush(partial)
        os.replace(partial, self.directory / STATE)
        flush(self.directory)

    def _finish(self, vocab_size: int, encoder: Encoder) -> dict[str, Any]:
        counts = self.state.counts
        for side, name, remedy in (("train", "train", "give more of them"), ("val", "validate", _VAL_REMEDY)):
            if not counts[f"documents_{side}"]:
                raise SettingsError(
                    f"val_fraction: {self.settings.val_fraction} with seed {self.settings.seed} leaves no document to "
                    f"{name}, of {len(self.sources)} source(s), the first {self.sources[0].name}; {remedy}"
                )
        histograms = [
            sum((np.bincount(shard, minlength=vocab_size) for shard in shards), np.zeros(vocab_size, np.int64))
            for shards in open_corpus(self.directory)
        ]
        with _writing(self.final.parent):
            manifest = write_manifest(
                self.directory,
                {
                    **self.facts,
                    "settings": self.settings.to_json(),
                    "sources": [source.name for source in self.sources[:_NAMED_SOURCES]],
                    "sources_count": len(self.sources),
                    "vocab_size": vocab_size,
                    "eos_id": encoder.eos_id,
                    "bos_id": encoder.bos_id,
                    **counts,
                    "first_empty": self.state.first_empty,
                    "bytes_per_token": sum(counts[f"bytes_{side}"] for side in SIDES)
                    / sum(counts[f"tokens_{side}"] for side in SIDES),
                    "unigram_val_loss": unigram_loss(*histograms),
                    "python_version": platform.python_version(),
                },
            )
            publish(self.directory, self.final)
        return manifest


class _Room:
    """How many documents each side still takes."""

    def __init__(self, limits: Mapping[str, int | None], taken: dict[str, int]) -> None:
        self._limits = limits
        self._taken = taken

    def is_full(self, *sides: str) -> bool:
        limits = [(self._taken[side], self._limits.get(side)) for side in sides]
        return all(limit is not None and taken >= limit for taken, limit in limits)

    def take(self, side: str) -> None:
        self._taken[side] += 1


_DISK_ERRORS = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG}
_VAL_REMEDY = "name files to validate on, raise val_fraction, or try another seed"


def _check(sources: Sequence[Source], settings: CorpusSettings, workers: int | None) -> None:
    if isinstance(settings.tokenizer, BPESettings):
        settings.tokenizer.check()
    if not 0 <= settings.val_fraction < 1:
        raise SettingsError(
            f"val_fraction: {settings.val_fraction} must be at least 0 and less than 1, for example 0.05"
        )
    for name, count in (*((f"{side}_count", count) for side, count in settings.counts.items()), ("workers", workers)):
        if count is not None and count < 1:
            raise SettingsError(f"{name}: {count} must be at least 1; leave it out for the default")
    splits = {source.split for source in sources}
    if not splits & {"train", None}:
        raise SettingsError(
            f"val_fraction: {settings.val_fraction} leaves no document to train on, of {len(sources)} source(s); give "
            "more of them, or lower val_fraction"
        )
    if "val" not in splits and not (None in splits and settings.val_fraction):
        raise SettingsError(
            f"val_fraction: {settings.val_fraction} leaves no document to validate on, as none of {len(sources)} "
            f"source(s) validates by name; {_VAL_REMEDY}"
        )


def _workers(sources: Sequence[Source], workers: int | None) -> int:
    if workers is not None:
        return workers
    size = sum(source.size for source in sources)
    return 1 if 0 < size < _SMALL_BYTES else count_cores()


@contextmanager
def _only_one(directory: Path, verbose: bool) -> Iterator[None]:
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if verbose:
            print(f"Waiting for another process that prepares {directory}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(data_path: Path) -> Iterator[None]:
    """Say what to do about a write that failed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise SettingsError(
            f"data_path: preparing the corpus in {str(data_path)!r} failed ({error.strerror or error}), what is done "
            "is kept; free disk space or set data_path to another disk, then run again"
        ) from error


def _summary(manifest: Mapping[str, Any]) -> str:
    documents, size = (sum(manifest[f"{what}_{split}"] for split in SIDES) for what in ("documents", "bytes"))
    return (
        f"{documents:,} documents, {size / 1e6:.2f} MB, {manifest['tokens_train']:,} training and "
        f"{manifest['tokens_val']:,} validation tokens"
    )
