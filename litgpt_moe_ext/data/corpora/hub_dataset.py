"""Any data set of the Hugging Face hub."""

from dataclasses import dataclass

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.hub import HubSplit
from litgpt_moe_ext.data.pipeline.sources import FileHashes, Source
from litgpt_moe_ext.errors import SettingsError


@dataclass(kw_only=True)
class HubDataset(DocumentCorpus):
    """A data set of the Hugging Face hub, or a local folder that its library can load.

    The `datasets` library downloads and caches it, or, with `streaming`, names the files to read over the network.
    Without a network (`HF_HUB_OFFLINE=1`) its cache or a local folder works.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_split is not None and _overlap(self.train_split, self.val_split):
            raise SettingsError(
                f"data.val_split: {self.val_split!r} has rows of train_split {self.train_split!r}, which would train "
                "and validate; name rows of their own, such as train[:99%] and train[99%:]"
            )

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `EncodedCorpus.sources`."""
        which = {"name": self.config, "revision": self.revision, "data_files": self.data_files}
        if self.val_split is None:
            splits = [HubSplit(self.dataset, self.train_split, None, which)]
        else:
            splits = [
                HubSplit(self.dataset, self.train_split, "train", which),
                HubSplit(self.dataset, self.val_split, "val", which),
            ]
        return [source for split in splits for source in split.sources(self.text_format, hashes, self.streaming)]


def _overlap(first: str, second: str) -> bool:
    # Whether two splits have rows in common, as far as that is seen without counting any.
    ours, theirs = ([part.strip() for part in split.split("+")] for split in (first, second))
    return any(
        "all" in (a, b) or b in (a, a.partition("[")[0]) or a == b.partition("[")[0] for a in ours for b in theirs
    )
