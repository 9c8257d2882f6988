"""The quickstart corpus: the source code of Python's own standard library. Nothing has to be downloaded."""

from dataclasses import dataclass
from pathlib import Path

from litgpt_moe_ext.data.modules.packed import PackedCorpus
from litgpt_moe_ext.data.pipeline.python_files import prepare_python_files


@dataclass
class PythonStdlib(PackedCorpus):
    """Python source files, by default those of the running Python's standard library, without tests and tables.

    About 10 MB of text, 2.6 million training tokens at the default vocabulary, prepared in a few seconds by the first
    run. The files differ between Python versions, so losses compare only between runs on the same corpus; its hash is
    in ``manifest.json``, together with the validation loss of a unigram model that training should beat.
    """

    data_path: Path = Path("data/python_stdlib")
    """Cache folder. Every combination of files and settings gets a folder of its own in it."""
    source_path: Path | None = None
    """Another folder of ``.py`` files to use instead of the standard library."""
    vocab_size: int = 4096
    """Upper bound for the vocabulary of the byte-level BPE tokenizer trained on the training files."""
    val_fraction: float = 0.05
    """Share of the files, chosen by a hash of their relative path, that validate."""
    seed: int = 42
    """Decides which files validate and how the training windows are shuffled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data_path = Path(self.data_path)
        self.source_path = None if self.source_path is None else Path(self.source_path)

    def planned_vocabulary(self) -> tuple[str, int]:
        """See `PackedCorpus.planned_vocabulary`."""
        return f"data.vocab_size={self.vocab_size}", self.vocab_size

    def prepare_corpus(self, verbose: bool) -> Path:
        """See `litgpt_moe_ext.data.pipeline.python_files.prepare_python_files`."""
        return prepare_python_files(
            self.data_path, self.source_path, self.vocab_size, self.val_fraction, self.seed, verbose
        )
