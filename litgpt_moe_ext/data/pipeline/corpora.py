"""Text corpora: files of any kind, and the corpora and the data set hub that have a form of their own.

Settings and the way to the documents. Needs neither torch nor LitGPT; `data.modules.text` makes data modules of these.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.data.pipeline.hub import cached_source, streamed_sources
from litgpt_moe_ext.data.pipeline.readers import Record, TextFormat
from litgpt_moe_ext.data.pipeline.sources import FileHashes, Source, file_sources, find_files
from litgpt_moe_ext.data.pipeline.text_corpus import CorpusSettings, prepare_text_corpus
from litgpt_moe_ext.data.pipeline.tokenizer import BPESettings
from litgpt_moe_ext.data.pipeline.tokenizer_files import litgpt_tokenizer, read_tokenizer


@dataclass(kw_only=True)
class TextSettings:
    """What all text corpora have in common. A subclass says where the documents are."""

    data_path: Path = Path("data/text")
    """Cache folder. Every combination of documents and settings gets a folder of its own in it."""
    tokenizer_dir: Path | None = None
    """Tokenizer in Hugging Face format (or GPT-2's vocabulary and merges) to encode with."""
    bpe: BPESettings | None = None
    """Instead: train a BPE tokenizer on the training documents."""
    prepend_bos: bool = False
    """Whether each document starts with the BOS token. Each ends with EOS."""
    val_fraction: float = 0.05
    """Share of the documents that validate where no files are named for it, chosen by a hash of their text."""
    field: str = "text"
    """JSON key, or column, that holds the text."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do about bytes that are no UTF-8."""
    workers: int | None = None
    """Processes that encode. Default: one per core; below 32 MB one, with a thread per core."""
    seed: int = 42
    """Decides which documents validate, and in training the order of the windows."""

    @abstractmethod
    def sources(self, hashes: FileHashes) -> list[Source]:
        """Finds what to read.

        Raises:
            OSError: Files are missing or cannot be read.
            ValueError: There are none of the right kind.
        """

    @property
    def text_format(self) -> TextFormat:
        """How to read the sources."""
        return TextFormat(self.field, None, self.invalid_utf8)

    def prepare(self, verbose: bool = True, tokenizer: Any = None) -> Path:
        """Prepares the corpus if needed and returns its folder.

        Args:
            verbose: Whether to show progress, and to print a line also when there is nothing to do.
            tokenizer: A `litgpt.Tokenizer` to encode with if the settings name none.

        Raises:
            ValueError, OSError: As `litgpt_moe_ext.data.pipeline.text_corpus.prepare_text_corpus`.
        """
        chosen = self._choose_tokenizer(tokenizer)
        hashes = FileHashes(Path(self.data_path))
        sources = self.sources(hashes)
        text_format = self.text_format
        reading = {name: getattr(text_format, name) for name in text_format.__slots__}
        settings = CorpusSettings(chosen, self.prepend_bos, self.val_fraction, self.seed, reading)
        directory = prepare_text_corpus(Path(self.data_path), sources, settings, self.workers, verbose)
        hashes.save()
        return directory

    def _choose_tokenizer(self, given: Any) -> dict[str, bytes] | BPESettings:
        if self.tokenizer_dir is not None and self.bpe is not None:
            raise ValueError(
                f"data.tokenizer_dir={str(self.tokenizer_dir)!r} and data.bpe are both set. Keep tokenizer_dir to use "
                "that tokenizer, or bpe to train one."
            )
        if self.tokenizer_dir is not None:
            return read_tokenizer(self.tokenizer_dir)
        if self.bpe is not None:
            return self.bpe
        if given is not None:
            return litgpt_tokenizer(given)
        raise ValueError(
            "No tokenizer: set data.tokenizer_dir to a folder with one, or data.bpe.vocab_size to train one on the "
            "documents."
        )


@dataclass(kw_only=True)
class TextCorpus(TextSettings):
    """Text in files: plain text, JSON lines, lists of JSON objects, parquet, each also as `.gz` or in a tar archive.

    A plain text file is one document, unless a separator is given.
    """

    source_path: Path
    """A file, or a folder with the files to train on at any depth."""
    val_path: Path | None = None
    """A file or a folder to validate on. Default: a share of the training documents, `val_fraction`."""
    pattern: str = "**/*.txt"
    """Which files in the folders, as a glob: `**/*.parquet`, `train-*.jsonl.gz`, ..."""
    separator: str | None = None
    """What ends a document in a plain text file, for example `<|endoftext|>`."""

    @property
    def text_format(self) -> TextFormat:
        """How to read the sources."""
        return replace(super().text_format, separator=self.separator)

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `TextSettings.sources`."""
        if self.val_path is None:
            return file_sources(
                find_files("source_path", Path(self.source_path), self.pattern), None, self.text_format, hashes
            )
        return _split_sources(
            find_files("source_path", Path(self.source_path), self.pattern),
            find_files("val_path", Path(self.val_path), self.pattern),
            self.text_format,
            hashes,
        )


@dataclass(kw_only=True)
class CodeParrot(TextSettings):
    """CodeParrot-clean: Python files from GitHub in 54 gzipped shards of JSON lines.

    From a folder with ``file-000000000001.json.gz`` to ``..54.json.gz`` (or some of them; the last validates, as in the
    original), or without one through the Hugging Face library, which needs a network or a filled cache.
    """

    source_path: Path | None = None
    """Folder of the shards. Default: the data sets `codeparrot/codeparrot-clean-train` and `-valid` of the hub."""
    data_path: Path = Path("data/codeparrot")
    """Cache folder. Every combination of documents and settings gets a folder of its own in it."""
    field: str = "content"
    """JSON key, or column, that holds the text."""
    streaming: bool = False
    """Without `source_path`: read the shards over the network as they are encoded, instead of downloading them first.
    """

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `TextSettings.sources`."""
        if self.source_path is None:
            return [
                source
                for name, side in (("train", "train"), ("valid", "val"))
                for source in _hub_sources(self, f"codeparrot/codeparrot-clean-{name}", "train", side, hashes)
            ]
        if self.streaming:
            raise ValueError(
                f"streaming has no effect on the files in source_path={str(self.source_path)!r}. Leave out one of the "
                "two."
            )
        *train, val = find_files("source_path", Path(self.source_path), "file-*.json.gz")
        if not train:
            raise ValueError(
                f"source_path={str(self.source_path)!r} has a single shard, {val.name}, which would validate: there is "
                "nothing to train on. Set source_path to a folder with at least two shards."
            )
        return _split_sources(train, [val], self.text_format, hashes)


@dataclass(kw_only=True)
class TinyStories(TextSettings):
    """TinyStories in any of its forms: parquet, the archive or folder of JSON lists, or two text files.

    | what is at `source_path`                                  | validates                    |
    | --------------------------------------------------------- | ---------------------------- |
    | ``train-*.parquet``, ``validation-*.parquet``             | ``validation-*``             |
    | ``TinyStories_all_data.tar.gz``, or its ``data*.json``    | the first, ``data00.json``   |
    | ``*train*.txt``, ``*valid*.txt`` with ``<|endoftext|>``   | ``*valid*.txt``              |
    """

    source_path: Path
    """The archive, or a folder with the files at any depth."""
    data_path: Path = Path("data/tinystories")
    """Cache folder. Every combination of documents and settings gets a folder of its own in it."""
    field: str | None = None
    """JSON key, or column, that holds the text. Default: `text` in parquet, `story` in JSON."""

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `TextSettings.sources`."""
        folder = Path(self.source_path)
        stories = TextFormat(self.field or "story", None, self.invalid_utf8)
        if folder.is_file():
            (archive,) = file_sources([folder], None, stories, hashes)
            return [
                replace(
                    archive,
                    split=split,
                    identity=f"{archive.identity}:{split}",
                    records=partial(_of_members, archive, split == "val"),
                )
                for split in ("train", "val")
            ]
        found = find_files("source_path", folder, "**/*")
        forms = (
            (".parquet", lambda name: name.startswith("validation"), replace(stories, field=self.field or "text")),
            (".json", lambda name: name == _FIRST_STORIES, stories),
            (".txt", lambda name: "valid" in name.lower(), replace(stories, separator="<|endoftext|>")),
        )
        for suffix, validates, text_format in forms:
            files = [file for file in found if file.suffix == suffix]
            val = [file for file in files if validates(file.name)]
            train = [file for file in files if file not in val]
            if train and val:
                return _split_sources(train, val, text_format, hashes)
        raise ValueError(
            f"source_path={str(folder)!r} has none of TinyStories' forms with both a training and a validation part: "
            f"train-*.parquet and validation-*.parquet, {_FIRST_STORIES} and others, or *train*.txt and *valid*.txt. "
            f"It has {', '.join(file.name for file in found[:5])}. Set source_path to another, or use TextCorpus."
        )

    @property
    def text_format(self) -> TextFormat:
        """What of the format is a setting; the rest follows from the files."""
        return TextFormat(self.field or "", None, self.invalid_utf8)


@dataclass(kw_only=True)
class HubDataset(TextSettings):
    """A data set of the Hugging Face hub, or a local folder that its library can load.

    The ``datasets`` library downloads and caches it, or, with `streaming`, names the files to read over the network.
    Without a network (``HF_HUB_OFFLINE=1``) its cache or a local folder works.
    """

    dataset: str
    """Name on the hub, such as `roneneldan/TinyStories`; a local folder; or `json` or `parquet` with `data_files`."""
    config: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Which files of the data set, as globs or URLs; in a dictionary by split. Default: as the data set says."""
    train_split: str = "train"
    """Rows to train on; the library's slices work: `train[:1%]`."""
    val_split: str | None = None
    """Rows to validate on. Default: a share of the training rows, `val_fraction`."""
    streaming: bool = False
    """Read parquet or JSON files over the network as they are encoded, instead of downloading them first."""

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `TextSettings.sources`."""
        splits = [(self.train_split, None)]
        if self.val_split is not None:
            splits = [(self.train_split, "train"), (self.val_split, "val")]
        which = {"name": self.config, "revision": self.revision, "data_files": self.data_files}
        return [
            source
            for split, side in splits
            for source in _hub_sources(self, self.dataset, split, side, hashes, **which)
        ]


_FIRST_STORIES = "data00.json"


def _hub_sources(
    settings: CodeParrot | HubDataset,
    dataset: str,
    split: str,
    side: Literal["train", "val"] | None,
    hashes: FileHashes,
    **which: Any,
) -> list[Source]:
    if settings.streaming:
        return streamed_sources(dataset, split, side, settings.text_format, hashes, **which)
    return [cached_source(dataset, split, side, settings.text_format, **which)]


def _split_sources(train: list[Path], val: list[Path], text_format: TextFormat, hashes: FileHashes) -> list[Source]:
    if both := set(train) & set(val):
        raise ValueError(f"{sorted(both)[0]} would train and validate. Set val_path to files of their own.")
    return file_sources(train, "train", text_format, hashes) + file_sources(val, "val", text_format, hashes)


def _of_members(archive: Source, validating: bool) -> Iterator[Record]:
    for record in archive.records():
        if (record.member == _FIRST_STORIES) == validating:
            yield record
