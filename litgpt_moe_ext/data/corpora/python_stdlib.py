"""The quickstart corpus: the source code of Python's own standard library. Nothing has to be downloaded."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from litgpt_moe_ext.data.corpora.documents import EncodedCorpus
from litgpt_moe_ext.data.pipeline.finding import say_left_out
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import Source, require_unchanged
from litgpt_moe_ext.data.pipeline.store.finished import in_validation
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt, Share
from litgpt_moe_ext.wording import counted, quoted

# Tests are repetitive and hold binary-like literals; packages are not part of the standard library.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Character tables and rendered documentation, a fifth of the standard library's bytes. A small model would spend its
# capacity on their hexadecimal numbers.
GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})


@dataclass(kw_only=True)
class PythonStdlib(EncodedCorpus):
    """Python source files, by default those of the running Python's standard library, without tests and tables.

    About 10 MB of text, 2.6 million training tokens at the default vocabulary, prepared in a few seconds by the first
    run. The files differ between Python versions, so compare losses only between runs on the same corpus. Its hash is
    in `manifest.json`, with the validation loss of a unigram model, which training should beat.

    Left out are test folders, files that are unreadable, blank or not UTF-8, and all but the first (by path) of files
    with the same content. Line ends become LF, as Python itself reads them.
    """

    data_path: Path = Path("data/python_stdlib")
    """Cache folder, with a folder of its own for every combination of documents and settings."""
    source_path: Path | None = None
    """Another folder of `.py` files to use instead of the standard library."""
    packages: bool = False
    """Without `source_path`: read the running Python's installed packages instead."""
    vocab_size: PositiveInt = 4096
    """Upper bound of the vocabulary size of the byte-level BPE tokenizer trained on the training files."""
    val_fraction: Share = 0.05
    """Share of the files to validate on, chosen by a hash of their relative path."""

    def planned_vocabulary(self) -> tuple[str, int]:
        """See `Corpus.planned_vocabulary`."""
        return f"data.vocab_size: {self.vocab_size}", self.vocab_size

    def planned_borders(self) -> tuple[int, int | None]:
        """See `Corpus.planned_borders`."""
        return self.borders_with(self.choose_tokenizer(None))

    def choose_tokenizer(self, given: Any) -> BPESettings:
        """See `EncodedCorpus.choose_tokenizer`; the tokenizer always belongs to the corpus."""
        return BPESettings(self.vocab_size)

    def sources(self, hashes: FileHashes) -> list[Source]:
        """Return a source per file, sorted by relative path, whose hash decides whether it trains or validates."""
        folder, skipped = self._folder()
        if not folder.is_dir():
            raise SettingsError(
                f"source_path: {quoted(folder)} is not a folder; set it to a folder with .py files, or leave it out to "
                "use Python's standard library"
            )
        found: dict[str, Source] = {}
        unreadable = 0
        for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in _files(folder, skipped)):
            try:
                stat, content = path.stat(), path.read_bytes()
            except OSError as error:
                say_left_out(error)
                continue
            if not _is_text(content):
                unreadable += 1
            elif content.strip():
                digest = hashlib.sha256(content).hexdigest()
                side = "val" if in_validation(name, self.val_fraction, self.seed) else "train"
                records = partial(documents, path, self.text_format)
                check = partial(require_unchanged, path, stat, digest)
                found.setdefault(digest, Source(name, side, len(content), digest, records, check))
        if not found:
            raise SettingsError(
                f"source_path: {quoted(folder)} has no usable .py files ({unreadable} are not UTF-8 text); set it to a "
                f"folder with Python sources. Not searched are folders named {', '.join(sorted(skipped))} or with a "
                "leading dot"
            )
        if unreadable:
            print(f"Skipped {counted(unreadable, 'file')} of {folder}: not UTF-8 text", flush=True)
        return list(found.values())

    def _folder(self) -> tuple[Path, frozenset[str]]:
        # The folder of the files, and the folders in it to leave out.
        if self.source_path is not None:
            if self.packages:
                raise SettingsError(
                    f"packages: true has no effect beside source_path: {quoted(self.source_path)}; leave out one of "
                    "the two"
                )
            return self.source_path, SKIPPED_FOLDERS
        if self.packages:
            return Path(sysconfig.get_path("purelib")), SKIPPED_FOLDERS
        return Path(sysconfig.get_path("stdlib")), SKIPPED_FOLDERS | GENERATED_FOLDERS


def _files(folder: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=say_left_out):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if name.endswith(".py") and path.is_file():  # not a dangling link
                yield path


def _is_text(content: bytes) -> bool:
    try:
        return "\x00" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False
