"""Corpora that are already prepared, by a script of `data_prep/` or on another machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe_ext.data.corpora.base import Corpus
from litgpt_moe_ext.data.pipeline.store.finished import MANIFEST, read_manifest
from litgpt_moe_ext.data.pipeline.store.verification import verify
from litgpt_moe_ext.data.pipeline.store.wandb_artifacts import check_reference, download
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted


@dataclass(kw_only=True)
class FinishedCorpus(Corpus):
    """An already prepared corpus, read in whole or from its beginning."""

    @property
    def document_limits(self) -> tuple[int | None, int | None]:
        """See `Corpus.document_limits`."""
        return self.train_count, self.val_count


@dataclass
class PreparedCorpus(FinishedCorpus):
    """A prepared corpus: a folder with a tokenizer, shards and a manifest."""

    corpus_dir: Path
    """The folder with the `manifest.json`."""

    def check_sources(self) -> None:
        """Check that the corpus exists."""
        if read_manifest(self.corpus_dir) is None:
            raise SettingsError(
                f"corpus_dir: {quoted(self.corpus_dir)} has no {MANIFEST}, so it is not a prepared corpus; set "
                "corpus_dir to a folder that a script of data_prep/ made"
            )

    def prepare(self, verbose: bool = True, tokenizer: Any = None) -> Path:
        """See `Corpus.prepare`; only checks that the corpus is whole and unchanged."""
        self.check_sources()
        verify(self.corpus_dir, verbose)
        return self.corpus_dir


@dataclass
class WandbCorpus(FinishedCorpus):
    """A prepared corpus downloaded from W&B.

    If a W&B run is active, as with `logger_name: wandb`, the artifact becomes its input.
    """

    reference: str
    """The artifact, as `entity/project/name:alias`."""
    artifacts_dir: Path = Path("data/wandb")
    """Folder for downloads, with a folder of its own for each version."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference(self.reference)

    @classmethod
    def instead_of(cls, data: Any, reference: str, artifacts_dir: Path | None) -> "WandbCorpus":
        """Return the corpus of `reference`, with the reading settings of a recipe's data module, if any."""
        corpus = cls(reference) if artifacts_dir is None else cls(reference, artifacts_dir)
        for name in ("packing", "shuffle", "seed", "train_count", "val_count"):
            if hasattr(data, name):
                setattr(corpus, name, getattr(data, name))
        return corpus

    def prepare(self, verbose: bool = True, tokenizer: Any = None) -> Path:
        """See `Corpus.prepare`; downloads the artifact, or checks an existing download."""
        directory = download(self.reference, self.artifacts_dir)
        if verbose:
            print(f"Using the W&B artifact {self.reference} in {directory}", flush=True)
        return directory
