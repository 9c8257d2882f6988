"""The base of data modules whose corpus is prepared once into token shards."""

from abc import abstractmethod
from pathlib import Path

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as HFTokenizer

from litgpt_moe_ext.data.loader import TokenLoader
from litgpt_moe_ext.data.prepare import TOKENIZER_DIR, open_corpus, read_manifest


class PackedCorpus(DataModule):
    """A LitGPT data module over one prepared corpus: tokenizer, training shard, validation shard.

    A subclass is a dataclass with the user's settings, among them ``seed``, that implements `prepare_corpus`. The
    order of calls is LitGPT's: ``connect``, ``prepare_data``, ``setup``, then the two loaders. An entry point that
    wants LitGPT to use (and to copy into the checkpoints) the tokenizer of the corpus calls `prepare_tokenizer`
    before all of these.
    """

    seed: int

    def __post_init__(self) -> None:
        super().__init__()
        # Ordinary attributes rather than dataclass fields: they are no settings and stay out of logged hyperparameters.
        self.batch_size = 1
        self.max_seq_length = -1
        self.tokenizer: Tokenizer | None = None
        self.corpus_path: Path | None = None
        self._train_tokens: np.ndarray | None = None
        self._val_tokens: np.ndarray | None = None

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
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length
        if self.corpus_path is not None:
            self._check_tokenizer()

    def prepare_data(self) -> None:
        """Prepares the corpus unless this was done before.

        Raises:
            ValueError: The tokenizer given to `connect` is not the one of the corpus, or a setting cannot work.
            FileNotFoundError: The source is missing.
        """
        if self.corpus_path is None:
            self.corpus_path = self.prepare_corpus(verbose=rank_zero_only.rank == 0)
        self._check_tokenizer()

    def setup(self, stage: str = "") -> None:
        """Opens the token shards."""
        self.prepare_data()  # reuses; where only rank 0 was asked to prepare, this finds its result
        self._train_tokens, self._val_tokens = open_corpus(self.corpus_path)

    @property
    def unigram_loss(self) -> float:
        """Validation loss, in nats per token, of a model that knows only how frequent each token is."""
        return read_manifest(self.corpus_path)["unigram_val_loss"]

    def train_dataloader(self) -> TokenLoader:
        """Returns the shuffled, resumable training loader."""
        return self._loader(train=True)

    def val_dataloader(self) -> TokenLoader:
        """Returns the validation loader: file order, every window once."""
        return self._loader(train=False)

    def _loader(self, train: bool) -> TokenLoader:
        tokens = self._train_tokens if train else self._val_tokens
        if tokens is None:
            raise RuntimeError("Call setup() before asking for a data loader.")
        if self.max_seq_length < 1:
            raise ValueError(
                f"max_seq_length={self.max_seq_length}: call connect(batch_size=..., max_seq_length=...) with the "
                "length of the model's input before asking for a data loader."
            )
        return TokenLoader(
            tokens,
            block_size=self.max_seq_length,
            batch_size=self.batch_size,
            train=train,
            seed=self.seed,
            name="training data" if train else "validation data",
            corpus=self.corpus_path.name,
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
