"""Where documents come from: files, URLs, or a data set of the Hugging Face library; one class stands for each."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.data.pipeline.store import MANIFEST, TOKENIZER_DIR
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import Record, TextFormat
from litgpt_moe_ext.data.reading.remote import name_of, remote_facts
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.checksums import sha256_of
from litgpt_moe_ext.files.durable import replacing

Side = Literal["train", "val"]
SIDES: tuple[Side, ...] = ("train", "val")
HASHES = ".file_hashes.json"
# A file that was written so shortly before it was hashed may be written again without another time of change.
_SETTLED_SECONDS = 2.0
_QUESTIONS_AT_ONCE = 16
_KINDS = 5  # that a line about other files names


@dataclass(frozen=True, slots=True)
class Source:
    """A sequence of documents.

    Attributes:
        name: For messages, and to keep sources apart.
        split: Which side its documents belong to; None: each on its own, by a hash of its text.
        size: Bytes on disk (0 if unknown); for progress.
        identity: Equal for equal content.
        records: Starts reading from the beginning.
    """

    name: str
    split: Side | None
    size: int
    identity: str
    records: Callable[[], Iterator[Record]]

    def __post_init__(self) -> None:
        """Raise SettingsError if the split is no side."""
        if self.split not in (*SIDES, None):
            sides = ", ".join(map(repr, SIDES))
            raise SettingsError(
                f"data: the source {self.name!r} has the split {self.split!r}, which must be one of {sides}, or None "
                "where each document goes by a hash of its text"
            )


class FileHashes:
    """SHA-256 of files, remembered by path, size and times of change.

    The time of the last change of content can be set, as copying with all times does; that of any change cannot.

    Args:
        folder: Where the memory is kept, in a file `HASHES`. It is only a memory: without it, files are read again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / HASHES
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, list] = known if isinstance(known, dict) else {}
        self._changed = False

    def hash(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file's content.

        Raises:
            SettingsError: It cannot be read.
        """
        try:
            stat = path.stat()
            if (known := self._remembered(path, stat)) is not None:
                return known
            started = time.time()
            digest = sha256_of(path)
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
        if stat.st_mtime < started - _SETTLED_SECONDS:
            self._known[str(path.absolute())] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest]
            self._changed = True
        return digest

    def _remembered(self, path: Path, stat: os.stat_result) -> str | None:
        known = self._known.get(str(path.absolute()))
        of_file = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        return known[-1] if isinstance(known, list) and known[:-1] == of_file else None

    def remembers(self, path: Path) -> bool:
        """Return whether a file was hashed before and has not changed since."""
        return self._remembered(path, path.stat()) is not None

    def save(self) -> None:
        """Write what was learned. A failure is only reported: the corpus does not need it."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as partial_path:
                partial_path.write_text(json.dumps(self._known), encoding="utf-8")
        except OSError as error:
            print(
                f"The hashes of the files could not be kept ({error}), so the next run reads the files again",
                flush=True,
            )
        self._changed = False


class UnreadFiles(FileHashes):
    """In place of hashes: no file is read, and each counts as different from all others."""

    def __init__(self) -> None:
        pass

    def hash(self, path: Path) -> str:
        """Return the path of a file."""
        return str(path)


_OTHER_FILES = "read other files with TextCorpus, its pattern and field"


def find_files(setting: str, path: Path, pattern: str, otherwise: str = _OTHER_FILES) -> list[Path]:
    """Return the files that a setting names: `path` itself, or those below the folder that match a glob, sorted.

    Left out is what has a leading dot or lies in such a folder, and what lies in a prepared corpus.

    Args:
        setting: Its name.
        path: Its value.
        pattern: The glob.
        otherwise: What else to do about a folder that has none of them, but to set the setting to another.

    Raises:
        SettingsError: There is nothing at `path`, no file matches, or one is a link to a file outside of the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SettingsError(f"{setting}: {str(path)!r} does not exist; set {setting} to a file or a folder")
    found = [file for file in sorted(matches("pattern", path, pattern)) if file.is_file()]
    _refuse_links_out(setting, path, found)
    # A cache may lie in the folder of the documents. The corpora in it are not documents.
    found = [file for file in found if not _is_hidden(file, path)]
    prepared = _prepared(path, say_left_out if "**" in pattern else None)
    found = [file for file in found if prepared.isdisjoint(file.parents)]
    if not found:
        raise SettingsError(
            f"{setting}: {str(path)!r} has no files like {pattern!r}, it has {_names(path)}; set {setting} to another "
            f"folder, or {otherwise}"
        )
    return found


def say_others(path: Path, pattern: str) -> None:
    """Say which kinds of files in a folder are left out by the default pattern, which the user did not choose."""
    if not path.is_dir():
        return
    files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
    prepared, matching = _prepared(path, None), set(path.glob(pattern))
    left_out = (file for file in files if file not in matching and prepared.isdisjoint(file.parents))
    others = Counter(file.suffix or file.name for file in left_out)
    if others:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in others.most_common(_KINDS))
        print(f"Left out in {path}, as not like {pattern}: {kinds}; pattern names others", flush=True)


def say_left_out(error: OSError) -> None:
    """Say which folder cannot be read; `os.walk` would leave it out silently."""
    print(f"Left out {error.filename}, which cannot be read ({error.strerror})", flush=True)


def _prepared(path: Path, unreadable: Callable[[OSError], None] | None) -> set[Path]:
    # The prepared corpora below a folder.
    found = set()
    for parent, folders, files in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if MANIFEST in files and TOKENIZER_DIR in folders:
            found.add(Path(parent))
    return found


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def matches(setting: str, folder: Path, pattern: str) -> list[Path]:
    """Return what in a folder matches the glob that a setting holds.

    Raises:
        SettingsError: It is not a glob, or one of another place.
    """
    try:
        return list(folder.glob(pattern))
    except (NotImplementedError, ValueError) as error:  # an absolute pattern, and an empty one
        raise SettingsError(
            f"{setting}: {pattern!r} must be a glob below {str(folder)!r}, such as '**/*.txt' ({error})"
        ) from error


def file_sources(
    files: Sequence[Path], split: Side | None, text_format: TextFormat, hashes: FileHashes
) -> list[Source]:
    """Return a source per file.

    Raises:
        SettingsError: A file cannot be read.
    """
    sources = []
    for file in files:
        stat, content = file.stat(), hashes.hash(file)
        records = partial(_as_hashed, file, text_format, (stat.st_size, stat.st_mtime_ns), content)
        sources.append(Source(str(file), split, stat.st_size, _identity(file, content), records))
    return sources


def _as_hashed(file: Path, text_format: TextFormat, before: tuple[int, int], content: str) -> Iterator[Record]:
    # The documents of a file. Hours may lie between its hash, by which the corpus is found again, and its end.
    yield from documents(file, text_format)
    if not file.exists():
        return
    stat = file.stat()
    if (stat.st_size, stat.st_mtime_ns) != before and sha256_of(file) != content:
        raise SettingsError(f"{file} has changed since the preparation began; run again when nothing writes to it")


def split_sources(
    train: Sequence[Path], val: Sequence[Path], text_format: TextFormat, hashes: FileHashes
) -> list[Source]:
    """Return the sources of files to train on and of files to validate on.

    Raises:
        SettingsError: A file, or the content of one, is among both.
    """
    if both := set(train) & set(val):
        raise SettingsError(f"val_path: {sorted(both)[0]} would train and validate; set val_path to files of their own")
    ours, theirs = file_sources(train, "train", text_format, hashes), file_sources(val, "val", text_format, hashes)
    training = {source.identity: source.name for source in ours}
    for source in theirs:
        if source.size and source.identity in training:
            raise SettingsError(
                f"val_path: {source.name} has the content of {training[source.identity]}, which would train and "
                "validate; remove one of them, or set val_path to files of their own"
            )
    return ours + theirs


def remote_sources(urls: Sequence[str], split: Side | None, text_format: TextFormat) -> list[Source]:
    """Return a source per URL, which is read only as far as its documents are asked for.

    Raises:
        SettingsError: A file does not exist, its server cannot be reached, or does not say anything by which a change
            of a file could be noticed.
    """
    with ThreadPoolExecutor(_QUESTIONS_AT_ONCE) as pool:
        facts = list(pool.map(remote_facts, urls))
    return [
        Source(url, split, size, _identity(Path(name_of(url)), content), partial(documents, url, text_format))
        for url, (size, content) in zip(urls, facts, strict=True)
    ]


def dataset_source(dataset: Any, name: str, split: Side | None, text_format: TextFormat) -> Source:
    """Return the rows of a `datasets.Dataset` as a source.

    Raises:
        SettingsError: It has no such column.
    """
    if text_format.field not in dataset.column_names:
        raise SettingsError(
            f"field: {text_format.field!r} is not a column of {name}; set field to one of {dataset.column_names}"
        )
    texts = dataset.select_columns([text_format.field])
    # The library knows the bytes of the whole data set, of which this may be a slice.
    rows = sum(split.num_examples for split in (dataset.info.splits or {}).values())
    size = (dataset.info.dataset_size or 0) * len(dataset) // max(rows, 1)
    return Source(name, split, size, dataset._fingerprint, partial(_rows, texts, name, text_format.field, size))


def _rows(dataset: Any, name: str, field: str, size: int) -> Iterator[Record]:
    rows = max(len(dataset), 1)
    for number, row in enumerate(dataset):
        text = row[field]
        if text is not None and not isinstance(text, str):
            raise SettingsError(
                f"field: {field!r} of {name} holds {type(text).__name__} at row {number}; set field to a column of text"
            )
        yield Record(text or "", f"row {number}", size * (number + 1) // rows)


def _identity(file: Path, content: str) -> str:
    return f"{''.join(file.suffixes[-2:])}:{content}"  # the name says how to read it


def _refuse_links_out(setting: str, folder: Path, files: Iterable[Path]) -> None:
    """Raise SettingsError if a file is a link that leads out of the folder, or of the hub's cache of a repository."""
    root = folder.resolve()
    # The hub's cache keeps the content beside the folders of snapshots: repository/blobs, repository/snapshots/commit.
    root = next((parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"), root)
    for file in files:
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise SettingsError(
                f"{setting}: {file} is a link to {file.resolve()}, outside of the folder; copy the file into the "
                "folder, or remove the link"
            )


def _names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
