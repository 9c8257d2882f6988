"""FineWeb-Edu as text."""

from dataclasses import dataclass
from pathlib import Path

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.finding import find_files
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.hub import HubSplit, refuse_streaming
from litgpt_moe_ext.data.pipeline.sources import Source, file_sources
from litgpt_moe_ext.field_types import Share


@dataclass(kw_only=True)
class FineWeb(DocumentCorpus):
    """FineWeb-Edu: web pages of educational value, in parquet files.

    Read from a folder with the files, or without one through the Hugging Face library. Ready-made token shards, such as
    build-nanogpt's and llm.c's, need no preparation: `TokenShards` reads them.
    """

    source_path: Path | None = None
    """Folder with the parquet files at any depth. Default: the dataset `HuggingFaceFW/fineweb-edu` on the hub."""
    subset: str = "sample-10BT"
    """Configuration of the dataset on the hub."""
    data_path: Path = Path("data/fineweb_edu")
    """Cache folder, with a folder of its own for every combination of documents and settings."""
    val_fraction: Share = 0.01
    """Share of the documents to validate on, chosen by a hash of their text."""
    streaming: bool = False
    """Without `source_path`: stream the files over the network while encoding, instead of downloading them first."""

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `EncodedCorpus.sources`."""
        if self.source_path is None:
            split = HubSplit("HuggingFaceFW/fineweb-edu", "train", None, {"name": self.subset})
            return split.sources(self.text_format, hashes, self.streaming)
        refuse_streaming(self.streaming, self.source_path)
        files = find_files("source_path", self.source_path, "**/*.parquet")
        return file_sources(files, None, self.text_format, hashes)
