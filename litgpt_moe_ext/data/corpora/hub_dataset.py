"""Any dataset of the Hugging Face hub."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.hub import HubSplit
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
                HubSplit(self.dataset, self.val_split, "val", which, trained=self.train_split),
            ]
        return [source for split in splits for source in split.sources(self.text_format, hashes, self.streaming)]


# A split, or rows of it: `train`, `train[:1%]`, `train[100:-100]`.
_ROWS = re.compile(r"\s*([\w.]+)\s*(?:\[(-?\d[\d_]*%?)?:(-?\d[\d_]*%?)?\])?(?:\(\w+\))?\s*")


class _Place(NamedTuple):
    """A place in a split: percent or number of rows from the beginning, or from the end if negative."""

    number: float
    unit: str

    def is_at_most(self, other: "_Place") -> bool:
        # As far as can be told without counting rows; the beginning and the end are comparable in any unit.
        ends = {0.0: -math.inf, math.inf: math.inf}
        ours, theirs = (ends.get(place.number, place.number) for place in (self, other))
        if math.isinf(ours) or math.isinf(theirs):
            return ours <= theirs
        return self.unit != other.unit or (ours < 0) != (theirs < 0) or ours <= theirs


def _rows(part: str) -> tuple[str, _Place, _Place] | None:
    if (found := _ROWS.fullmatch(part)) is None:
        return None
    name, first, last = found.groups()
    unit = "%" if "%" in part else "rows"  # both are what one of them is
    return name, _place(first or "0", unit), _place(last, unit)


def _place(text: str | None, unit: str) -> _Place:
    number = math.inf if text is None else float(text.rstrip("%"))
    if unit == "%":
        number = number + 100 if number < 0 else number if number < 100 else math.inf
    return _Place(number, unit)


def _overlap(first: str, second: str) -> bool:
    # Whether two splits have rows in common, as far as can be told without counting rows.
    ours, theirs = ([_rows(part) for part in split.split("+")] for split in (first, second))
    return any(
        "all" in (a[0], b[0]) or (a[0] == b[0] and not (a[2].is_at_most(b[1]) or b[2].is_at_most(a[1])))
        for a in ours
        for b in theirs
        if a is not None and b is not None
    )
