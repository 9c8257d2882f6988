"""A corpus that is prepared already, by a script of `data_prep/` or on another machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt_moe_ext.data.packed import PackedCorpus
from litgpt_moe_ext.data.prepare import MANIFEST, read_manifest


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
