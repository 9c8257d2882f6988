"""Corpora that are prepared already, by a script of `data_prep/` or on another machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.data.modules.packed import PackedCorpus
from litgpt_moe_ext.data.pipeline.corpus import MANIFEST, read_manifest
from litgpt_moe_ext.data.pipeline.wandb_artifacts import check_reference, download


@dataclass
class PreparedCorpus(PackedCorpus):
    """A finished corpus: a folder with a tokenizer, shards and a manifest."""

    corpus_dir: Path
    """The folder with the `manifest.json`."""
    packing: Literal["stream", "best_fit", "pad"] = "stream"
    """How documents fill the windows: one after the other and cut where a window ends; whole, as many as fit, and
    padding that the loss leaves out; one a window, and padding."""
    shuffle: bool = True
    """Whether the windows come in a random order, or in that of the documents."""
    seed: int = 42
    """Decides the order of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.corpus_dir = Path(self.corpus_dir)

    def prepare_corpus(self, verbose: bool) -> Path:
        """Checks that the corpus is whole.

        Raises:
            FileNotFoundError: There is no corpus.
            ValueError: It is damaged.
        """
        if read_manifest(self.corpus_dir) is None:
            raise FileNotFoundError(
                f"corpus_dir={str(self.corpus_dir)!r} is no prepared corpus: it has no {MANIFEST}. Set corpus_dir to a "
                "folder that a script of data_prep/ made."
            )
        return self.corpus_dir


@dataclass
class WandbCorpus(PackedCorpus):
    """A prepared corpus that is downloaded from W&B.

    If a W&B run is active, as with ``logger_name: wandb``, the artifact becomes an input of it.
    """

    reference: str
    """The artifact, as `entity/project/name:alias`."""
    artifacts_dir: Path = Path("data/wandb")
    """Where downloads are kept, each version in a folder of its own."""
    packing: Literal["stream", "best_fit", "pad"] = "stream"
    """How documents fill the windows: one after the other and cut where a window ends; whole, as many as fit, and
    padding that the loss leaves out; one a window, and padding."""
    shuffle: bool = True
    """Whether the windows come in a random order, or in that of the documents."""
    seed: int = 42
    """Decides the order of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.artifacts_dir = Path(self.artifacts_dir)
        check_reference(self.reference)

    @classmethod
    def instead_of(cls, data: Any, reference: str, artifacts_dir: Path | None) -> "WandbCorpus":
        """Returns the corpus of `reference`, read as the data module of a recipe (or None) would be."""
        corpus = cls(reference) if artifacts_dir is None else cls(reference, artifacts_dir)
        for name in ("packing", "shuffle", "seed"):
            if hasattr(data, name):
                setattr(corpus, name, getattr(data, name))
        return corpus

    def prepare_corpus(self, verbose: bool) -> Path:
        """Downloads the artifact; what is there already is only compared.

        Raises:
            ValueError: It cannot be reached or is no corpus.
        """
        directory = download(self.reference, self.artifacts_dir)
        if verbose:
            print(f"Using the W&B artifact {self.reference} in {directory}", flush=True)
        return directory
