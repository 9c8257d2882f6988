"""Text in files of many formats."""

from dataclasses import dataclass, replace
from pathlib import Path

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.finding import find_files, say_others
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import Source, file_sources, split_sources
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.errors import SettingsError

_OTHERWISE = "the pattern to one that matches"


@dataclass(kw_only=True)
class TextCorpus(DocumentCorpus):
    """Text in files: plain text, JSON lines, lists of JSON objects, CSV, TSV, parquet; compressed, or in tar archives.

    A plain text file is one document unless a separator is given. Compressed files end in `.gz`, `.bz2`, `.xz` or
    `.zst`.
    """

    source_path: Path
    """File to train on, or folder with the files at any depth."""
    val_path: Path | None = None
    """File or folder to validate on. Default: a share of the training documents, `val_fraction`."""
    pattern: str = "**/*.txt"
    """Glob of the files in the folders, such as `**/*.parquet` or `train-*.jsonl.gz`."""
    separator: str | None = None
    """End of a document in plain text files, for example `<|endoftext|>`. Its line ends match any style."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator == "":
            raise SettingsError("data.separator: '' must have a character; leave it out to make each file one document")

    @property
    def text_format(self) -> TextFormat:
        """See `EncodedCorpus.text_format`."""
        return replace(super().text_format, separator=self.separator)

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `EncodedCorpus.sources`."""
        train = find_files("source_path", self.source_path, self.pattern, _OTHERWISE)
        if self.pattern == type(self).pattern:
            say_others(self.source_path, self.pattern)
        if self.val_path is None:
            return file_sources(train, None, self.text_format, hashes)
        val = find_files("val_path", self.val_path, self.pattern, _OTHERWISE)
        return split_sources(train, val, self.text_format, hashes)
