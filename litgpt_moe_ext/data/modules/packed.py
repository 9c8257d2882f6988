"""The base of data modules whose corpus is prepared once into token shards."""

from abc import abstractmethod
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as HFTokenizer

from litgpt_moe_ext.data.modules.base import TokenModule
from litgpt_moe_ext.data.packing import document_lengths, pack
from litgpt_moe_ext.data.pipeline.corpus import TOKENIZER_DIR, open_corpus, read_manifest
from litgpt_moe_ext.data.windows import DocumentWindows, StreamWindows, Windows


class PackedCorpus(TokenModule):
    """A LitGPT data module over one prepared corpus: a tokenizer, shards to train on, shards to validate on.

    A subclass is a dataclass with the user's settings that implements `prepare_corpus`. An entry point that wants
    LitGPT to use (and to copy into the checkpoints) the tokenizer of the corpus calls `prepare_tokenizer` before
    ``connect``.

    Attributes:
        packing: How documents fill the windows. ``stream``: one after the other, cut wherever a window ends.
            ``best_fit``: whole, as many as fit, the rest of the window is padding. ``pad``: one document a window.
    """

    packing: Literal["stream", "best_fit", "pad"] = "stream"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.corpus_path: Path | None = None
        self._model_vocab_size: int | None = None

    @abstractmethod
    def prepare_corpus(self, verbose: bool) -> Path:
        """Prepares the corpus if needed and returns its folder; must be safe in several processes at once."""

    def prepare_tokenizer(self) -> Path:
        """Prepares everything if needed and returns the tokenizer directory."""
        self.prepare_data()
        return self.corpus_path / TOKENIZER_DIR

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Takes over what is known only at run time.

        Args:
            tokenizer: None, or the one of this corpus. With None, as in ``litgpt pretrain`` without a tokenizer
                directory, training works all the same, only no tokenizer is copied into the checkpoints.
            batch_size: Windows per batch and process.
            max_seq_length: Number of inputs of a window.

        Raises:
            ValueError: The corpus is prepared already and `tokenizer` is another one. If it is not prepared yet,
                `prepare_data` raises instead.
        """
        super().connect(tokenizer, batch_size, max_seq_length)
        if self.corpus_path is not None:
            self._check_tokenizer()

    def prepare_data(self) -> None:
        """Prepares the corpus unless this was done before.

        Raises:
            ValueError: The tokenizer given to `connect` is not the one of the corpus, its vocabulary is larger than the
                one `require_vocabulary` named, or a setting cannot work.
            FileNotFoundError: The source is missing.
        """
        if self.corpus_path is None:
            self.corpus_path = self.prepare_corpus(verbose=rank_zero_only.rank == 0)
        self._check_tokenizer()
        self._check_vocabulary()

    def open_shards(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `TokenModule.open_shards`."""
        self.prepare_data()  # reuses; where only rank 0 was asked to prepare, this finds its result
        return open_corpus(self.corpus_path)

    def windows(self, shards: list[np.ndarray], name: str) -> Windows:
        """See `TokenModule.windows` and `packing`."""
        if self.packing == "stream":
            return StreamWindows(shards, self.max_seq_length, name)
        from litgpt_moe_ext.host.padding import accept_padding

        accept_padding()
        lengths = document_lengths(shards, read_manifest(self.corpus_path)["eos_id"])
        packing = pack(lengths, self.max_seq_length, together=self.packing == "best_fit")
        return DocumentWindows(shards, packing, self.max_seq_length, name)

    def planned_vocabulary(self) -> tuple[str, int] | None:
        """Returns the setting that decides the size of the vocabulary, with its value, and the size.

        None if only the prepared corpus tells.
        """
        return None

    def require_vocabulary(self, padded_vocab_size: int) -> None:
        """See `TokenModule.require_vocabulary`; where the settings tell, before anything is prepared.

        The ids were checked against the vocabulary when they were written.
        """
        self._model_vocab_size = padded_vocab_size
        if self.corpus_path is not None:
            self._check_vocabulary()
        elif (planned := self.planned_vocabulary()) is not None and planned[1] > padded_vocab_size:
            raise ValueError(
                f"{planned[0]} means {planned[1]} tokens, more than the model's padded_vocab_size={padded_vocab_size}. "
                f"Set model_config.padded_vocab_size to {planned[1]} or more, or choose a smaller vocabulary."
            )

    @property
    def corpus_id(self) -> str:
        """The key of the corpus, and how it is packed."""
        return self.corpus_path.name if self.packing == "stream" else f"{self.corpus_path.name}:{self.packing}"

    @property
    def unigram_loss(self) -> float:
        """Validation loss, in nats per token, of a model that knows only how frequent each token is."""
        return read_manifest(self.corpus_path)["unigram_val_loss"]

    def _check_vocabulary(self) -> None:
        vocab_size = read_manifest(self.corpus_path)["vocab_size"]
        if self._model_vocab_size is not None and vocab_size > self._model_vocab_size:
            raise ValueError(
                f"The corpus in {self.corpus_path} has a vocabulary of {vocab_size} tokens, more than the model's "
                f"padded_vocab_size={self._model_vocab_size}. Set model_config.padded_vocab_size to {vocab_size} or "
                "more, or prepare the corpus with a smaller vocabulary."
            )

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            return
        directory = self.corpus_path / TOKENIZER_DIR
        prepared = HFTokenizer.from_file(str(directory / "tokenizer.json")).to_str()
        # LitGPT's Tokenizer does not keep its path, and the same tokenizer may well come from a copy.
        given = self.tokenizer.processor.to_str() if self.tokenizer.backend == "huggingface" else None
        if given != prepared:
            raise ValueError(
                f"The given tokenizer ({self.tokenizer.model_name!r}) is not the one that encoded this corpus, so its "
                f"ids would mean other text. Set tokenizer_dir to {str(directory)!r}, or leave it out."
            )
