"""Any dataset of the Hugging Face hub."""

from dataclasses import dataclass

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.hub import HubSplit, check_slices
from litgpt_moe_ext.data.pipeline.sources import Source
from litgpt_moe_ext.errors import SettingsError


@dataclass(kw_only=True)
class HubDataset(DocumentCorpus):
    """A dataset of the Hugging Face hub, or a local folder that the `datasets` library can load.

    The library downloads and caches it or, with `streaming`, finds the files to read over the network. Without a
    network (`HF_HUB_OFFLINE=1`), its cache or a local folder works.
    """

    dataset: str
    """Name on the hub, such as `roneneldan/TinyStories`; a local folder; or `json` or `parquet` with `data_files`."""
    config: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files of the dataset, as globs or URLs, or a dictionary of them by split. Default: as the dataset says."""
    train_split: str = "train"
    """Rows to train on; the library's slices work: `train[:1%]`."""
    val_split: str | None = None
    """Rows to validate on. Default: a share of the training rows, `val_fraction`."""
    streaming: bool = False
    """Stream parquet or JSON files over the network while encoding, instead of downloading them first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_split == self.train_split:  # slices are checked when the datasets library is loaded
            raise SettingsError(
                f"data.val_split: {self.val_split!r} is train_split too, and would train and validate; name rows of "
                "their own, such as train[:99%] and train[99%:]"
            )

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `EncodedCorpus.sources`."""
        which = {"name": self.config, "revision": self.revision, "data_files": self.data_files}
        if self.val_split is None:
            splits = [HubSplit(self.dataset, self.train_split, None, which)]
        else:
            if not self.streaming:
                check_slices(self.train_split, self.val_split)
            splits = [
                HubSplit(self.dataset, self.train_split, "train", which),
                HubSplit(self.dataset, self.val_split, "val", which, trained=self.train_split),
            ]
        return [source for split in splits for source in split.sources(self.text_format, hashes, self.streaming)]
