"""The settings of a prepared corpus, besides its documents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from litgpt_moe_ext.data.pipeline.sources import SIDES, Source
from litgpt_moe_ext.data.pipeline.store.finished import in_validation
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.data.tokenizer.files import tokenizer_hash
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import counted

VAL_REMEDY = "name files to validate on, raise val_fraction, or try another seed"


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """Tokenizer, split and limits; the corpora check their ranges (`litgpt_moe_ext.data.corpora`).

    Attributes:
        tokenizer: The files of a tokenizer (`litgpt_moe_ext.data.tokenizer.files`), or settings to train one.
        prepend_bos: Whether each document starts with the BOS token; each ends with EOS.
        val_fraction: For sources without a split, the share of documents to validate on, chosen by a hash of their
            text: equal texts are on the same side.
        seed: Seed of that choice.
        counts: Maximum number of documents by side, from the first; None or missing: all.
        reading: How the sources were read, as JSON values.
        tokenizer_bytes: Bytes of text to train a tokenizer on; of larger corpora, the beginning of every source.
        shard_tokens: Tokens after which a shard is written and an interrupted preparation can continue.
    """

    tokenizer: Mapping[str, bytes] | BPESettings
    prepend_bos: bool = False
    val_fraction: float = 0.0
    seed: int = 42
    counts: Mapping[str, int | None] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_bytes: int = 1_000_000_000
    shard_tokens: int = 100_000_000

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        if isinstance(self.tokenizer, BPESettings):
            values["tokenizer"] = asdict(self.tokenizer)
        else:
            values["tokenizer"] = tokenizer_hash(dict(self.tokenizer))
        values["counts"] = {side: self.counts.get(side) for side in SIDES}
        return values

    def side_of(self, source: Source, text: str) -> str:
        """Return the side that a document of a source belongs to."""
        if source.split is not None:
            return source.split
        return "val" if in_validation(text, self.val_fraction, self.seed) else "train"

    def check(self, sources: Sequence[Source]) -> None:
        """Raise SettingsError if no source can train, or none can validate."""
        splits = {source.split for source in sources}
        if not splits & {"train", None}:
            raise SettingsError(
                f"val_fraction: {self.val_fraction} leaves no document to train on, of "
                f"{counted(len(sources), 'source')}; give more of them, or lower val_fraction"
            )
        if "val" not in splits and not (None in splits and self.val_fraction):
            raise SettingsError(
                f"val_fraction: {self.val_fraction} leaves no document to validate on, as none of "
                f"{counted(len(sources), 'source')} validates by name; {VAL_REMEDY}"
            )
