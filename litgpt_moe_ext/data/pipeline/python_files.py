"""A corpus of Python source files: finding, splitting and preparing it. Needs neither torch nor LitGPT."""

import hashlib
import os
import sysconfig
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe_ext.data.pipeline.corpus import (
    Document,
    Split,
    atomic_directory,
    build_corpus,
    cache_key,
    check_root,
    corpus_hash,
    in_validation,
    progress_bar,
    read_manifest,
)
from litgpt_moe_ext.data.pipeline.tokenizer import BPESettings

# Tests are repetitive and hold binary-like literals; packages are not part of the standard library.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Of the standard library: tables of character names and rendered documentation, a fifth of its bytes. A small model
# that sees them spends its capacity on hexadecimal numbers.
GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The documents of a folder, sorted by name, and how many files were left out and why."""

    documents: list[Document]
    empty: int
    undecodable: int
    duplicates: int


def read_python_files(folder: Path, also_skipped: Set[str] = frozenset()) -> SourceFiles:
    """Reads the ``.py`` files below a folder.

    Left out: everything below a folder named as in `SKIPPED_FOLDERS` or `also_skipped` or with a leading dot, files
    that are blank or no UTF-8, and all but the first (by path) of several files with the same content. Text is taken
    as it is, line ends included.

    Raises:
        FileNotFoundError: `folder` is no folder.
        ValueError: Nothing is left.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"source_path={str(folder)!r} is not a folder. Set source_path to a folder with .py files, or leave it out "
            "to use Python's standard library."
        )
    skipped = SKIPPED_FOLDERS | also_skipped
    paths: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths += [Path(parent, name) for name in files if name.endswith(".py")]

    documents: list[Document] = []
    seen: set[bytes] = set()
    empty = undecodable = duplicates = 0
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        if not path.is_file():
            continue  # a dangling link
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if not content.strip():
            empty += 1
        elif digest in seen:
            duplicates += 1
        else:
            seen.add(digest)
            try:
                documents.append(Document(name, content.decode("utf-8")))
            except UnicodeDecodeError:
                undecodable += 1
    if not documents:
        raise ValueError(
            f"source_path={str(folder)!r} has no usable .py files: {len(paths)} found, {empty} of them empty, "
            f"{undecodable} not UTF-8. Folders named {', '.join(sorted(skipped))} or with a leading dot are "
            "not searched. Set source_path to a folder with Python sources."
        )
    return SourceFiles(documents, empty, undecodable, duplicates)


def split_documents(documents: list[Document], val_fraction: float, seed: int) -> Split:
    """Splits by document into about ``1 - val_fraction`` and `val_fraction`.

    Raises:
        ValueError: One side is empty.
    """
    split = Split(
        train=[document for document in documents if not in_validation(document.name, val_fraction, seed)],
        val=[document for document in documents if in_validation(document.name, val_fraction, seed)],
    )
    for side, part in (("train", split.train), ("validation", split.val)):
        if not part:
            raise ValueError(
                f"val_fraction={val_fraction} with seed={seed} leaves no {side} file among {len(documents)}. "
                f"{'Raise' if side == 'validation' else 'Lower'} val_fraction, try another seed, or use a source_path "
                "with more files."
            )
    return split


def prepare_python_files(
    data_path: Path, source_path: Path | None, vocab_size: int, val_fraction: float, seed: int, verbose: bool = True
) -> Path:
    """Prepares the corpus unless it is there already, and returns its folder ``<data_path>/<key>``.

    Safe to call from several processes at once and to interrupt at any moment.

    Args:
        data_path: Folder of all prepared corpora.
        source_path: Folder of ``.py`` files; None takes the running Python's standard library.
        vocab_size: Upper bound for the tokenizer's vocabulary.
        val_fraction: Share of the files that validate, between 0 and 1.
        seed: Decides which files validate.
        verbose: Whether to print a line also when there is nothing to do.

    Raises:
        FileNotFoundError: `source_path` is no folder.
        ValueError: A setting cannot work, or a finished corpus was damaged.
        OSError: Writing failed, say on a full disk. Nothing half-finished is left.
    """
    BPESettings(vocab_size).check()
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1, both excluded, for example 0.05.")
    started = time.perf_counter()
    if source_path is None:
        files = read_python_files(Path(sysconfig.get_path("stdlib")), GENERATED_FOLDERS)
    else:
        files = read_python_files(Path(source_path))
    split = split_documents(files.documents, val_fraction, seed)
    corpus = corpus_hash(files.documents)
    settings = {"kind": "python_files", "vocab_size": vocab_size, "val_fraction": val_fraction, "seed": seed}
    directory = Path(data_path) / cache_key(corpus, settings)

    manifest = read_manifest(directory)
    if manifest is not None:
        if verbose:
            print(f"Reusing the Python corpus in {directory} ({_summary(manifest)})", flush=True)
        return directory

    check_root(directory.parent)
    try:
        with atomic_directory(directory) as partial, progress_bar() as on_progress:
            manifest = build_corpus(
                partial,
                split,
                vocab_size,
                {
                    "corpus_sha256": corpus,
                    "settings": settings,
                    "files": len(files.documents),
                    "files_empty": files.empty,
                    "files_undecodable": files.undecodable,
                    "files_duplicate": files.duplicates,
                    "bytes": sum(len(document.text.encode()) for document in files.documents),
                },
                on_progress,
            )
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"Preparing the corpus in data_path={str(data_path)!r} failed ({error.strerror or error}); nothing "
            "half-finished was left. Free disk space or set data_path to another disk, then run again",
        ) from error
    skipped = f", {files.undecodable} files skipped as not UTF-8" if files.undecodable else ""
    seconds = time.perf_counter() - started
    print(f"Prepared a Python corpus in {directory} ({_summary(manifest)}, {seconds:.1f} s{skipped})", flush=True)
    return directory


def _summary(manifest: dict[str, Any]) -> str:
    return (
        f"{manifest['files']} files, {manifest['bytes'] / 1e6:.2f} MB, {manifest['tokens_train']:,} training and "
        f"{manifest['tokens_val']:,} validation tokens"
    )
