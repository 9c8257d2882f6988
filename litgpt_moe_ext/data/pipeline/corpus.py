"""What every corpus preparation shares: a cache keyed by content, built aside and renamed into place.

A prepared corpus is a folder ``<root>/<key>/`` with ``tokenizer/``, ``train.bin``, ``val.bin`` and ``manifest.json``.
The key covers the documents and every setting, so a change of either leads to another folder and never to stale
tokens. The folder appears by one rename after everything in it is on disk, so whatever is found under its final name
is complete. A finished folder is never deleted here.

Nothing in this module imports torch.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer

from litgpt_moe_ext.data.pipeline.shards import open_shard, token_dtype, write_shard
from litgpt_moe_ext.data.pipeline.tokenizer import (
    BPESettings,
    open_for_documents,
    require_eos,
    threads_for_tokenizers,
    train_bpe,
)
from litgpt_moe_ext.durable import flush, flush_tree

FORMAT_VERSION = 1  # part of every key; raise it when the same input would lead to other files
TOKENIZER_DIR = "tokenizer"
TRAIN_SHARD = "train.bin"
VAL_SHARD = "val.bin"
MANIFEST = "manifest.json"

_PARTIAL = re.compile(r"\.(?P<key>[0-9a-f]+)\.(?P<host>[A-Za-z0-9-]*)\.(?P<pid>\d+)\.[0-9a-f]{8}\.partial")
_FOREIGN_PARTIAL_SECONDS = 24 * 3600
_ENCODE_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a name that is unique in its corpus (for files the relative POSIX path) and its text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """The documents to train on and those to validate on; no text may be in both."""

    train: Sequence[Document]
    val: Sequence[Document]


def corpus_hash(documents: Iterable[Document]) -> str:
    """Returns the SHA-256 (hex) of all names and texts, in the given order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode("utf-8", "surrogateescape"), document.text.encode("utf-8")):
            digest.update(len(part).to_bytes(8, "little"))  # lengths keep "ab" + "c" apart from "a" + "bc"
            digest.update(part)
    return digest.hexdigest()


def cache_key(corpus: str, settings: Mapping[str, Any]) -> str:
    """Returns 16 hex digits for a corpus hash and the settings (JSON values) that shape the result."""
    text = json.dumps({"format": FORMAT_VERSION, "corpus": corpus, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_validation(name: str, val_fraction: float, seed: int) -> bool:
    """Decides by a hash of the name whether a document validates.

    Adding or removing other documents does not move this one, and the share of all documents is about `val_fraction`.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Gives a new folder beside `final` that becomes `final` when the block ends without an error.

    If another process finishes `final` first, that one stays and ours is dropped: equal keys mean equal content.
    After an error our folder is removed; after a kill it stays under a name nobody looks for, until `remove_stale`
    clears it.

    Raises:
        FileExistsError: Something that is not a finished corpus is in the way.
        OSError: The folder cannot be written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(final.parent)
    partial = final.parent / f".{final.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        flush_tree(partial)
        try:
            os.rename(partial, final)
        except OSError as error:
            if not (final / MANIFEST).is_file():
                if final.exists():
                    raise FileExistsError(
                        f"{final} exists but is no finished corpus (it has no {MANIFEST}). Move or delete it, then run "
                        "again."
                    ) from error
                raise
        flush(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Removes unfinished folders in `root` whose process is gone.

    On this host a folder is stale when no process with its id lives, or only one that was started after the folder was
    last written (a reused id). For another host, say on a shared disk, age has to decide: one day.
    """
    for path in root.glob(".*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if match is None:
            continue
        try:
            written = path.stat().st_mtime
        except FileNotFoundError:
            continue  # its owner has just finished
        if match["host"] != _host():
            stale = time.time() - written > _FOREIGN_PARTIAL_SECONDS
        else:
            try:
                # The margin allows for a file server whose clock differs.
                stale = psutil.Process(int(match["pid"])).create_time() > written + 60
            except psutil.NoSuchProcess:
                stale = True
            except psutil.AccessDenied:
                stale = False
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def pack_documents(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    eos_id: int,
    dtype: np.dtype,
    on_progress: Callable[[int], None] = lambda characters: None,
    bos_id: int | None = None,
) -> np.ndarray:
    """Encodes documents and joins them, each followed by the end-of-sequence token.

    Args:
        tokenizer: One opened by `open_for_documents`, so that `eos_id` appears between documents only.
        texts: The documents.
        eos_id: The end-of-sequence token.
        dtype: Integer type of the result; must hold every id.
        on_progress: Called with the number of characters after each group of documents.
        bos_id: A token to put before each document, or None.

    Returns:
        Token ids, shape (N,), of type `dtype`.
    """
    pieces: list[np.ndarray] = [np.empty(0, dtype)]
    start = [] if bos_id is None else [bos_id]
    with threads_for_tokenizers():
        for group in _groups(texts, _ENCODE_BATCH_CHARACTERS):
            for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
                pieces.append(np.array([*start, *encoding.ids, eos_id], dtype=dtype))
            on_progress(sum(map(len, group)))
    return np.concatenate(pieces)


def unigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Returns `token_counts_loss` of tokens, each of shape (N,)."""
    return token_counts_loss(np.bincount(train, minlength=vocab_size), np.bincount(val, minlength=vocab_size))


def token_counts_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Returns the cross-entropy in nats per token of validation tokens under the frequencies of training tokens.

    Every training count is raised by one (Laplace), so that an id which is missing there does not make it infinite. A
    model below this value has learned something from context.

    Args:
        train: How often each id occurs, shape (vocabulary,).
        val: Likewise.
    """
    smoothed = train + 1.0
    return float(-(val @ np.log(smoothed / smoothed.sum())) / val.sum())


def build_corpus(
    directory: Path,
    split: Split,
    vocab_size: int,
    manifest: Mapping[str, Any],
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Trains the tokenizer on the training documents and writes tokenizer, shards and manifest into `directory`.

    Args:
        directory: An existing folder, usually the one of `atomic_directory`.
        split: The documents.
        vocab_size: Upper bound for the tokenizer's vocabulary.
        manifest: What else to record.
        on_progress: Called with a stage name, characters done and characters in all.

    Returns:
        The manifest as written.
    """
    all_documents = (split.train, split.val)
    total = sum(len(document.text) for part in all_documents for document in part)
    on_progress("training tokenizer", 0, total)
    tokenizer_dir = directory / TOKENIZER_DIR
    train_bpe((document.text for document in split.train), BPESettings(vocab_size), tokenizer_dir)
    tokenizer = open_for_documents(tokenizer_dir)
    eos_id = require_eos(tokenizer_dir)
    actual_vocab = tokenizer.get_vocab_size()

    done = 0

    def encoded(characters: int) -> None:
        nonlocal done
        done += characters
        on_progress("encoding", done, total)

    train, val = (
        pack_documents(
            tokenizer, (document.text for document in part), eos_id, token_dtype(actual_vocab), on_progress=encoded
        )
        for part in all_documents
    )
    write_shard(directory / TRAIN_SHARD, train, actual_vocab)
    write_shard(directory / VAL_SHARD, val, actual_vocab)

    bytes_train, bytes_val = (sum(len(document.text.encode()) for document in part) for part in all_documents)
    written = {
        **manifest,
        "format_version": FORMAT_VERSION,
        "vocab_size": actual_vocab,
        "eos_id": eos_id,
        "documents_train": len(split.train),
        "documents_val": len(split.val),
        "bytes_train": bytes_train,
        "bytes_val": bytes_val,
        "tokens_train": len(train),
        "tokens_val": len(val),
        "bytes_per_token": (bytes_train + bytes_val) / (len(train) + len(val)),
        "unigram_val_loss": unigram_loss(train, val, actual_vocab),
        "python_version": platform.python_version(),
        "file_sizes": {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }
    (directory / MANIFEST).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return written


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Returns the manifest of a finished corpus, or None if there is no finished corpus.

    Raises:
        ValueError: The manifest is unreadable, or a file it lists is missing or has another size: somebody changed the
            folder after it was finished.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sizes = manifest["file_sizes"].items()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Delete {directory} to prepare the corpus again.") from error
    for name, size in sizes:
        file = directory / name
        found = file.stat().st_size if file.is_file() else "no"
        if found != size:
            raise ValueError(
                f"{file} has {found} bytes where the manifest lists {size}. Delete {directory} to prepare the corpus "
                "again."
            )
    return manifest


def open_corpus(directory: Path) -> tuple[list[np.memmap], list[np.memmap]]:
    """Returns the training and the validation shards of a finished corpus in order, read-only, each of shape (N_i,)."""
    train, val = ([open_shard(path) for path in sorted(directory.glob(f"{side}*.bin"))] for side in ("train", "val"))
    return train, val


def check_root(root: Path) -> None:
    """Raises ValueError, with the remedy, unless `root` is a folder that can be created and written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".{uuid.uuid4().hex[:8]}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"data_path={str(root)!r} cannot be used as a cache folder: {error.strerror or error}. Set data_path to a "
            "folder that you can write to."
        ) from error


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback for `build_corpus` that draws a bar on a terminal and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def update(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total if done else None)

        yield update


def _groups(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
