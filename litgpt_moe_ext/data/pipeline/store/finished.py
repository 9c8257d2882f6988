"""Finished corpora on disk: their key, manifest and shards, and their publication.

A prepared corpus is a folder `<root>/<key>/` with `tokenizer/`, `train_*.bin`, `val_*.bin`, `manifest.json` and
checksums of them all. The key covers the documents and every setting, so a change of either leads to another folder and
never to stale tokens. The folder gets its final name by one rename after everything in it is on disk, so a folder of
that name is complete. Finished folders are never deleted here.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe_ext.data.pipeline.shards import open_shard
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.files.durable import flush, flush_tree, rename

FORMAT_VERSION = 3  # part of every key; raise it when the same input leads to other files
TOKENIZER_DIR = "tokenizer"
MANIFEST = "manifest.json"
STATE = "state.json"  # progress of an unfinished corpus


def cache_key(corpus: str, settings: Mapping[str, Any]) -> str:
    """Return a hash, 16 hex digits, of the documents and the settings (JSON values) that determine the result."""
    return key_of({"format_version": FORMAT_VERSION, "corpus_sha256": corpus, "settings": settings})


def key_of(manifest: Mapping[str, Any]) -> str:
    """Return the key of a finished corpus, even if its folder was renamed."""
    version, corpus, settings = (manifest[name] for name in ("format_version", "corpus_sha256", "settings"))
    text = json.dumps({"format": version, "corpus": corpus, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_validation(name: str, val_fraction: float, seed: int) -> bool:
    """Decide by a hash whether a document validates.

    Adding or removing other documents does not move this one. About `val_fraction` of all documents validate.

    Args:
        name: Identifies the document: its text, or its path.
        val_fraction: Share of all documents.
        seed: Seed of the choice.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def unigram_loss(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    """Return the cross-entropy in nats per token of validation tokens under the frequencies of training tokens.

    Every training count is increased by one (Laplace), so that ids missing from training do not make it infinite. A
    model with a lower loss has learned something from context.

    Args:
        train_counts: Training occurrences of each id, shape (vocabulary,).
        val_counts: Validation occurrences of each id, shape (vocabulary,).
    """
    smoothed = train_counts + 1.0
    return float(-(val_counts @ np.log(smoothed / smoothed.sum())) / val_counts.sum())


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a corpus whose other files are complete, and return it.

    Args:
        directory: The corpus.
        facts: Facts to record; the sizes of all files are added, except of this one and of the preparation's state.
    """
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, STATE, checksums.FILE_NAME)
    }
    manifest = {**facts, "format_version": FORMAT_VERSION, "file_sizes": sizes}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished corpus, or None if there is no finished corpus.

    Raises:
        SettingsError: The manifest is unreadable, a listed file is missing or has another size (the folder was changed
            after it was finished), or the corpus is another user's and not readable.
    """
    path = directory / MANIFEST
    _require_readable(directory, path, directory / checksums.FILE_NAME)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sizes = manifest["file_sizes"].items()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}); delete {directory} to prepare the corpus again") from error
    for name, size in sizes:
        file = directory / name
        _require_readable(file)
        found = file.stat().st_size if file.is_file() else "no"
        if found != size:
            raise SettingsError(
                f"{file} has {found} bytes where the manifest lists {size}; delete {directory} to prepare the corpus "
                "again"
            )
    return manifest


def _require_readable(*paths: Path) -> None:
    for path in paths:
        try:
            is_readable = not path.exists() or os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))
        except PermissionError:  # a folder above it may not be entered
            is_readable = False
        if not is_readable:
            raise SettingsError(
                f"{path} cannot be read (Permission denied); have its owner make it readable for you, or set data_path "
                "to a folder of your own"
            )


def open_corpus(directory: Path) -> tuple[list[np.memmap], list[np.memmap]]:
    """Return the training and the validation shards of a corpus in order, read-only, each of shape (N_i,)."""
    train, val = ([open_shard(path) for path in sorted(directory.glob(f"{side}*.bin"))] for side in ("train", "val"))
    return train, val


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its final name after everything in it is on disk, and delete its `STATE`.

    Args:
        partial: The folder, in the same file system.
        final: Its name, which must be free.
    """
    flush_tree(partial)
    rename(partial, final)
    flush(final.parent)
    (final / STATE).unlink(missing_ok=True)
