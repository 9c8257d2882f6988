"""Corpora of documents, which are found, split, encoded once, and kept in a cache."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.data.corpora.base import Corpus
from litgpt_moe_ext.data.pipeline.hashes import FileHashes, UnreadFiles
from litgpt_moe_ext.data.pipeline.preparation import prepare_corpus
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.pipeline.sources import Source
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.data.tokenizer.files import litgpt_tokenizer, read_tokenizer
from litgpt_moe_ext.data.tokenizer.opening import check_tokenizer, parse_tokenizer, special_token, vocabulary_size
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveFloat, PositiveInt, Share
from litgpt_moe_ext.wording import quoted


@dataclass(kw_only=True)
class EncodedCorpus(Corpus):
    """A corpus of documents; subclasses say where they are (`sources`) and how to encode them (`choose_tokenizer`)."""

    data_path: Path = Path("data/text")
    """Cache folder, with a folder of its own for every combination of documents and settings."""
    prepend_bos: bool = False
    """Whether to start each document with the BOS token. All end with EOS."""
    val_fraction: Share = 0.05
    """Share of the documents to validate on if no files are given for that, chosen by a hash of their text."""
    workers: PositiveInt | None = None
    """Number of encoding processes. Default: one per core; for less than 32 MB one, with a thread per core."""

    def sources(self, hashes: FileHashes) -> list[Source]:
        """Find the sources to read.

        Args:
            hashes: Known hashes of files.

        Raises:
            SettingsError: Files are missing, cannot be read, or are of another kind.
        """
        raise NotImplementedError

    def check_sources(self) -> None:
        """Check that the files of `source_path` exist, without reading them.

        Raises:
            SettingsError: Files are missing, or of another kind.
        """
        if getattr(self, "source_path", None) is not None:  # otherwise the documents are on the hub
            self.sources(UnreadFiles())

    def choose_tokenizer(self, given: Any) -> dict[str, bytes] | BPESettings:
        """Return the files of the tokenizer, or how to train one.

        Args:
            given: The `litgpt.Tokenizer` of the run, or None.

        Raises:
            SettingsError: The settings name no tokenizer, two, or one that cannot be read.
        """
        raise NotImplementedError

    @property
    def text_format(self) -> TextFormat:
        """How the settings say to read the sources; part of the corpus' key."""
        return TextFormat()

    def borders_with(self, chosen: dict[str, bytes] | BPESettings) -> tuple[int, int | None]:
        """Return what `planned_borders` does, for a result of `choose_tokenizer`."""
        if isinstance(chosen, BPESettings):
            end, begin = chosen.borders()
            return end, begin if self.prepend_bos else None
        where = Path(getattr(self, "tokenizer_dir", None) or "")
        return (
            special_token(chosen, "eos", where),
            special_token(chosen, "bos", where) if self.prepend_bos else None,
        )

    def prepare(self, verbose: bool = True, tokenizer: Any = None) -> Path:
        """See `Corpus.prepare`; an interrupted preparation continues."""
        chosen = self.choose_tokenizer(tokenizer)
        if isinstance(chosen, BPESettings):
            chosen.check()
        hashes = FileHashes(self.data_path)
        sources = self.sources(hashes)
        settings = CorpusSettings(
            tokenizer=chosen,
            prepend_bos=self.prepend_bos,
            val_fraction=self.val_fraction,
            seed=self.seed,
            counts={"train": self.train_count, "val": self.val_count},
            reading=asdict(self.text_format),
        )
        hashes.save()  # now, as the process may be killed during hours of encoding
        return prepare_corpus(self.data_path, sources, settings, self.workers, verbose)


@dataclass(kw_only=True)
class DocumentCorpus(EncodedCorpus):
    """A corpus whose tokenizer the user chooses; subclasses define where the documents are (`sources`)."""

    tokenizer_dir: Path | None = None
    """Directory of a tokenizer in Hugging Face format, or of GPT-2's vocabulary and merges, to encode with."""
    bpe: BPESettings | None = None
    """Instead, train a BPE tokenizer on the training documents, for example with `bpe.vocab_size` 2048."""
    field: str = "text"
    """JSON key or column of the text."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8."""
    max_expansion: PositiveFloat = 200.0
    """Maximum ratio of uncompressed to compressed size, against files made to fill the disk."""

    @property
    def text_format(self) -> TextFormat:
        """See `EncodedCorpus.text_format`."""
        return TextFormat(self.field, None, self.invalid_utf8, self.max_expansion)

    def planned_vocabulary(self) -> tuple[str, int] | None:
        """See `Corpus.planned_vocabulary`."""
        if self.bpe is not None:
            return f"data.bpe.vocab_size: {self.bpe.vocab_size}", self.bpe.vocab_size
        if self.tokenizer_dir is not None:
            content = self._read_tokenizer(self.tokenizer_dir)["tokenizer.json"]
            tokenizer = parse_tokenizer(content, f"tokenizer.json of {self.tokenizer_dir}")
            return f"data.tokenizer_dir: {quoted(self.tokenizer_dir)}", vocabulary_size(tokenizer)
        return None

    def planned_borders(self) -> tuple[int, int | None] | None:
        """See `Corpus.planned_borders`."""
        named = self.tokenizer_dir is not None or self.bpe is not None
        return self.borders_with(self.choose_tokenizer(None)) if named else None

    def _read_tokenizer(self, directory: Path) -> dict[str, bytes]:
        files = read_tokenizer(directory)
        check_tokenizer(files, directory, needs_bos=self.prepend_bos)
        return files

    def choose_tokenizer(self, given: Any) -> dict[str, bytes] | BPESettings:
        """See `EncodedCorpus.choose_tokenizer`."""
        if self.tokenizer_dir is not None and self.bpe is not None:
            raise SettingsError(
                f"data.tokenizer_dir: {quoted(self.tokenizer_dir)} and data.bpe are both set; keep tokenizer_dir to "
                "use that tokenizer, or bpe to train one"
            )
        if self.tokenizer_dir is not None:
            return self._read_tokenizer(self.tokenizer_dir)
        if self.bpe is not None:
            return self.bpe
        if given is not None:
            return litgpt_tokenizer(given)
        raise SettingsError(
            "data.tokenizer_dir: there is no tokenizer; set it to a folder with one, or data.bpe.vocab_size to train "
            "one on the documents"
        )
