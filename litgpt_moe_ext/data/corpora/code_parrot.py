"""CodeParrot-clean."""

from dataclasses import dataclass
from pathlib import Path

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.finding import find_files
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.hub import HubSplit, refuse_streaming
from litgpt_moe_ext.data.pipeline.sources import Source, split_sources
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted


@dataclass(kw_only=True)
class CodeParrot(DocumentCorpus):
    """CodeParrot-clean: Python files from GitHub in 54 gzipped shards of JSON lines.

    Read from a folder with `file-000000000001.json.gz` to `..54.json.gz` or some of them (the last validates, as in the
    original); without a folder, through the Hugging Face library, which needs a network or a filled cache.
    """

    source_path: Path | None = None
    """Folder of the shards. Default: the datasets `codeparrot/codeparrot-clean-train` and `-valid` on the hub."""
    data_path: Path = Path("data/codeparrot")
    """Cache folder, with a folder of its own for every combination of documents and settings."""
    field: str = "content"
    """JSON key or column of the text."""
    streaming: bool = False
    """Without `source_path`: stream the shards over the network while encoding, instead of downloading them first.
    """

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `EncodedCorpus.sources`."""
        if self.source_path is None:
            splits = (
                HubSplit("codeparrot/codeparrot-clean-train", "train", "train"),
                HubSplit("codeparrot/codeparrot-clean-valid", "train", "val"),
            )
            return [source for split in splits for source in split.sources(self.text_format, hashes, self.streaming)]
        refuse_streaming(self.streaming, self.source_path)
        *train, val = find_files("source_path", self.source_path, "file-*.json.gz")
        if not train:
            raise SettingsError(
                f"source_path: {quoted(self.source_path)} has a single shard, {val.name}, which would validate, and "
                "nothing to train on; set source_path to a folder with at least two shards"
            )
        return split_sources(train, [val], self.text_format, hashes)
