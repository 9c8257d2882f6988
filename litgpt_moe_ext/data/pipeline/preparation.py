"""Preparing a corpus of any size from sources: tokenizer, shards, manifest.

The documents are read as one stream, encoded by several processes and written in order, so the result does not depend
on the number of processes. Unfinished work is kept in `<root>/.<key>.unfinished`; its state records up to which
document the shards are complete, and the next run with the same key continues there. The key covers the content of all
sources and every setting, so stale work is never continued or used. A lock lets only one process work on a corpus.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe_ext.data.pipeline.batches import Intake
from litgpt_moe_ext.data.pipeline.encoding import Encoder, encode_in_order
from litgpt_moe_ext.data.pipeline.progress import PreparationProgress
from litgpt_moe_ext.data.pipeline.settings import VAL_REMEDY, CorpusSettings
from litgpt_moe_ext.data.pipeline.shards import open_shard, token_dtype, write_shard
from litgpt_moe_ext.data.pipeline.sources import SIDES, Source
from litgpt_moe_ext.data.pipeline.store.finished import (
    MANIFEST,
    STATE,
    TOKENIZER_DIR,
    cache_key,
    open_corpus,
    publish,
    read_manifest,
    unigram_loss,
    write_manifest,
)
from litgpt_moe_ext.data.pipeline.store.unfinished import DAYS, UNFINISHED, State, only_one, remove_leftovers, writing
from litgpt_moe_ext.data.pipeline.store.verification import verify
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.files import read_tokenizer, write_tokenizer
from litgpt_moe_ext.data.tokenizer.opening import open_for_documents, special_token, vocabulary_size
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.files.durable import flush_tree
from litgpt_moe_ext.machine import count_cores
from litgpt_moe_ext.wording import counted, quoted

# Below this size the threads of the tokenizers library are as fast: encoding is 97% of the work, and starting a process
# takes as long as encoding a megabyte.
_SMALL_BYTES = 32_000_000
_NAMED_SOURCES = 100  # most sources to name in a manifest
_LARGE_SHARE = 0.3  # validation share above which it is probably a mistake

_check: ContextVar[Callable[[Path, bool], None] | None] = ContextVar("check", default=None)


@contextmanager
def checked_first(check: Callable[[Path, bool], None]) -> Iterator[None]:
    """In the scope, call a function before a corpus is prepared, which may take hours.

    Args:
        check: Given the folder of the corpus and whether it already exists, raises SettingsError to refuse it.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def only_finished() -> AbstractContextManager[None]:
    """In the scope, refuse to prepare a corpus that does not exist yet."""

    def check(directory: Path, finished: bool) -> None:
        if not finished:
            raise SettingsError(
                f"data_path: {quoted(directory.parent)} has no corpus {directory.name}; train with it to prepare it"
            )

    return checked_first(check)


def prepare_corpus(
    data_path: Path,
    sources: Sequence[Source],
    settings: CorpusSettings,
    workers: int | None = None,
    verbose: bool = True,
) -> Path:
    """Prepare a corpus unless it already exists, and return its folder `<data_path>/<key>`.

    Safe to call from several processes at once (one works, the others wait) and to interrupt at any moment.

    Args:
        data_path: Folder of all prepared corpora.
        sources: Sources to read, in this order.
        settings: All other settings of the result.
        workers: Encoding processes; None takes one per core (for a small corpus, one with a thread per core).
        verbose: Whether to show progress, and to print a line even if there is nothing to do.

    Raises:
        SettingsError: A setting cannot work, a source or a finished corpus is damaged, or the disk is full; finished
            work is kept. Or the check of `checked_first` refuses the corpus.
    """
    settings.check(sources)
    corpus = hashlib.sha256(json.dumps([[source.split, source.identity] for source in sources]).encode()).hexdigest()
    directory = data_path / cache_key(corpus, settings.to_json())
    manifest = read_manifest(directory)
    if (check := _check.get()) is not None:
        check(directory, manifest is not None)
    if manifest is not None:
        verify(directory, verbose)
        if verbose:
            print(f"Reusing the corpus in {directory} ({_summary(manifest)})", flush=True)
        return directory
    with only_one(directory, verbose):
        if read_manifest(directory) is None:  # another process may have finished it meanwhile
            if directory.exists():
                raise SettingsError(
                    f"data_path: {directory} exists but is not a finished corpus (it has no {MANIFEST}); move or "
                    "delete it, then run again"
                )
            for folder in remove_leftovers(directory.parent):
                print(f"Deleted {folder}, an unfinished corpus that nobody has touched for {DAYS} days", flush=True)
            preparation = _Preparation(directory, sources, settings, {"corpus_sha256": corpus}, verbose)
            preparation.run(_workers(sources, workers))
    return directory


@dataclass(frozen=True)
class _TextsToLearnFrom:
    """The documents that a tokenizer is trained on; every iteration starts at the beginning."""

    intake: Intake
    progress: PreparationProgress

    def __iter__(self) -> Iterator[str]:
        self.progress.stage("training tokenizer")
        return self.intake.texts_to_learn_from(self.progress.update)


class _Preparation:
    """One run of the preparation of one corpus, which may continue an earlier one."""

    def __init__(
        self, directory: Path, sources: Sequence[Source], settings: CorpusSettings, facts: dict[str, Any], verbose: bool
    ) -> None:
        self.final = directory
        self.directory = directory.with_name(f".{directory.name}{UNFINISHED}")
        self.sources = sources
        self.settings = settings
        self.facts = facts
        self.verbose = verbose
        self.intake = Intake(sources, settings)
        self.state = State()
        self.buffers: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}

    def run(self, workers: int) -> None:
        started = time.perf_counter()
        with PreparationProgress(self.intake.offsets[-1], self.verbose) as progress:
            self._begin(progress)
            tokenizer_dir = self.directory / TOKENIZER_DIR
            tokenizer, files = open_for_documents(tokenizer_dir), read_tokenizer(tokenizer_dir)
            vocab_size = vocabulary_size(tokenizer)
            encoder = Encoder(
                tokenizer.to_str(),
                special_token(files, "eos", tokenizer_dir),
                special_token(files, "bos", tokenizer_dir) if self.settings.prepend_bos else None,
                token_dtype(vocab_size),
            )
            progress.stage("encoding", self.intake.offsets[self.state.source])
            taken: dict[str, int] = {side: self.state.counts[f"documents_{side}"] for side in SIDES}
            batches = self.intake.batches(self.state.source, self.state.record, taken)
            for batch, arrays in encode_in_order(encoder, batches, workers):
                self.state.add(batch, arrays)
                for side, array in zip(SIDES, arrays, strict=True):
                    self.buffers[side].extend([array] if len(array) else [])
                progress.update(self.intake.offsets[batch.source] + batch.position)
                if max(sum(map(len, buffer)) for buffer in self.buffers.values()) >= self.settings.shard_tokens:
                    self._commit(vocab_size)
            self._commit(vocab_size)
        manifest = self._finish(vocab_size, encoder)
        seconds = time.perf_counter() - started
        print(f"Prepared a corpus in {self.final} ({_summary(manifest)}, {seconds:.1f} s)", flush=True)
        if manifest["documents_empty"]:
            empty = counted(manifest["documents_empty"], "empty document")
            print(f"Skipped {empty}, the first at {manifest['first_empty']}")
        if repeated := len(self.sources) - len({source.identity for source in self.sources}):
            copies = counted(repeated, "source")
            print(f"{copies} with the same content as another one, which counts twice; remove copies to count it once")
        if undivided := self._undivided():
            print(undivided)
        share = manifest["documents_val"] / (manifest["documents_train"] + manifest["documents_val"])
        if share > _LARGE_SHARE:
            print(f"{share:.0%} of the documents are for validation; to use fewer, set val_count or name other files")

    def _begin(self, progress: PreparationProgress) -> None:
        """Continue existing work, or start with the tokenizer."""
        if (state := State.load(self.directory)) is None:
            self._start(progress)
        else:
            self.state, tokens = state, state.counts["tokens_train"]
            print(f"Continuing in {self.directory}: {counted(tokens, 'training token')} so far", flush=True)
        for split in SIDES:  # drop shards written after the state, whose documents come again
            for late in sorted(self.directory.glob(f"{split}_*.bin"))[self.state.shards[split] :]:
                late.unlink()
            self._require_tokens(split)
        for partial in self.directory.glob(".*.partial"):
            partial.unlink()

    def _require_tokens(self, split: str) -> None:
        found = sum(len(open_shard(path)) for path in self.directory.glob(f"{split}_*.bin"))
        if found != (expected := self.state.counts[f"tokens_{split}"]):
            raise SettingsError(
                f"data_path: the {split} shards in {self.directory} have {found:,} tokens where its {STATE} counts "
                f"{expected:,}; delete it to prepare the corpus anew"
            )

    def _start(self, progress: PreparationProgress) -> None:
        with writing(self.final.parent):
            self.directory.mkdir(exist_ok=True)
            tokenizer_dir = self.directory / TOKENIZER_DIR
            if isinstance(self.settings.tokenizer, BPESettings):
                train_bpe(_TextsToLearnFrom(self.intake, progress), self.settings.tokenizer, tokenizer_dir)
            else:
                write_tokenizer(dict(self.settings.tokenizer), tokenizer_dir)
            flush_tree(tokenizer_dir)
            self.state.save(self.directory)

    def _commit(self, vocab_size: int) -> None:
        """Write the buffered tokens, then the state that counts them."""
        with writing(self.final.parent):
            for side, buffer in self.buffers.items():
                if buffer:
                    path = self.directory / f"{side}_{self.state.shards[side]:05}.bin"
                    write_shard(path, np.concatenate(buffer), vocab_size)
                    self.state.shards[side] += 1
                    buffer.clear()
            self.state.save(self.directory)

    def _documents(self) -> int:
        return sum(self.state.counts[f"documents_{side}"] for side in SIDES)

    def _undivided(self) -> str:
        """Return a line if there is a separator that divides nothing; empty otherwise."""
        separator, limits = self.settings.reading.get("separator"), self.settings.counts.values()
        if separator is None or any(limit is not None for limit in limits) or self._documents() > len(self.sources):
            return ""
        hint = " (a shell gives the line end, and not a backslash, for $'\\n')" if "\\" in separator else ""
        return f"separator: {separator!r} is within no file, so each is one document{hint}"

    def _finish(self, vocab_size: int, encoder: Encoder) -> dict[str, Any]:
        counts = self.state.counts
        for side, name, remedy in (("train", "train", "give more of them"), ("val", "validate", VAL_REMEDY)):
            if not counts[f"documents_{side}"]:
                raise SettingsError(
                    f"val_fraction: {self.settings.val_fraction} with seed {self.settings.seed} leaves no document to "
                    f"{name}, of {counted(self._documents(), 'document')} in {counted(len(self.sources), 'source')}, "
                    f"the first {self.sources[0].name}; {self._undivided() or remedy}"
                )
        histograms = [
            sum((np.bincount(shard, minlength=vocab_size) for shard in shards), np.zeros(vocab_size, np.int64))
            for shards in open_corpus(self.directory)
        ]
        with writing(self.final.parent):
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
            checksums.write(self.directory, leave_out=(STATE,))
            publish(self.directory, self.final)
        return manifest


def _workers(sources: Sequence[Source], workers: int | None) -> int:
    if workers is not None:
        return workers
    size = sum(source.size for source in sources)
    return 1 if 0 < size < _SMALL_BYTES else count_cores()


def _summary(manifest: Mapping[str, Any]) -> str:
    documents, size = (sum(manifest[f"{what}_{split}"] for split in SIDES) for what in ("documents", "bytes"))
    return (
        f"{counted(documents, 'document')}, {size / 1e6:.2f} MB, {manifest['tokens_train']:,} training and "
        f"{manifest['tokens_val']:,} validation tokens"
    )
