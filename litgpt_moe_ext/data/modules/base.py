"""The base classes of data modules over tokens."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal

import numpy as np
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader

from litgpt_moe_ext.data.loader import Order, TokenLoader
from litgpt_moe_ext.data.windows import StreamWindows, Windows
from litgpt_moe_ext.errors import SettingsError


def is_first_rank() -> bool:
    """Return whether this is the process that prints; before the ranks are connected, every process does."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


class TokenModule(DataModule):
    """A LitGPT data module over memory-mapped tokens.

    A subclass is a dataclass with the user's settings. The order of calls is LitGPT's: `connect`, `prepare_data`,
    `setup`, then the two loaders. An entry point that knows the model may call `require_vocabulary` before them.
    """

    def __post_init__(self) -> None:
        super().__init__()
        # Ordinary attributes rather than dataclass fields: they are not settings and stay out of logged
        # hyperparameters.
        self.batch_size = 1
        self.max_seq_length = -1
        self.tokenizer: Tokenizer | None = None

    def connect(  # pyrefly: ignore[bad-override] LitGPT's own modules take no more either
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Take over the values known only at run time.

        Args:
            tokenizer: The tokenizer of the run, or None.
            batch_size: Windows per micro-batch, that is per batch and rank.
            max_seq_length: Number of inputs of a window.
        """
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length

    @abstractmethod
    def require_vocabulary(self, padded_vocab_size: int) -> None:
        """Raise SettingsError, with the remedy, if the data may contain ids without an embedding in the model."""

    def require_documents(self, boundary: str, token_id: int) -> None:
        """Raise SettingsError if a model that attends within documents would not find the data's boundaries.

        Args:
            boundary: `eos` or `bos`, the model's `attention_document_boundary`.
            token_id: The model's `attention_document_token_id`.
        """

    @property
    def pads(self) -> bool:
        """Whether rows may contain padding; `litgpt pretrain` then weighs tokens (`litgpt_moe_ext.host.padding`)."""
        return False


class ShardModule(TokenModule):
    """One stream of token shards for training and one for validation, read by `TokenLoader`.

    Attributes:
        seed: Seed of the order of the windows.
        shuffle: Whether to shuffle the windows; otherwise they keep the order of the data.
    """

    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self._model_vocab_size: int | None = None
        self._shards: dict[str, Sequence[np.ndarray]] | None = None

    def setup(self, stage: str = "") -> None:
        """Open the token shards."""
        train, val = self.open_shards()
        self._shards = {"training": train, "validation": val}

    @abstractmethod
    def open_shards(self) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """Return the training and the validation shards, each of shape (N_i,)."""

    @property
    @abstractmethod
    def corpus_id(self) -> str:
        """Identifies the data in checkpoints."""

    def windows(self, shards: Sequence[np.ndarray], name: str) -> Windows:
        """Return the rows that the loaders return."""
        return StreamWindows(shards, self.max_seq_length, name)

    def train_dataloader(self) -> TokenLoader:
        """Return the resumable training loader."""
        return self._loader("training")

    def val_dataloader(self) -> DataLoader:
        """Return the validation loader: file order, every window once."""
        return self._loader("validation")

    def windows_of(self, split: Literal["training", "validation"], name: str) -> Windows:
        """Return the rows of a split; call `connect` and `setup` before.

        Args:
            split: The split.
            name: Name of the data in error messages.
        """
        if self._shards is None:
            raise RuntimeError("Call setup() before asking for a data loader.")
        return self.windows(self._shards[split], name)

    def _loader(self, split: Literal["training", "validation"]) -> TokenLoader:
        windows = self.windows_of(split, f"{split} data")
        order = Order(self.seed, self.shuffle, self.corpus_id)
        return TokenLoader(windows, self.batch_size, train=split == "training", order=order)


@contextmanager
def naming(corpus: str, module: Any) -> Iterator[None]:
    """In the scope, have errors give the full names of the settings of a mixture's corpus.

    Args:
        corpus: Name of the corpus in the mixture.
        module: The corpus, a dataclass; its own errors name settings as if it were used alone.
    """
    try:
        yield
    except SettingsError as error:
        own = error.setting.removeprefix("data.")
        if own.partition(".")[0] not in {field.name for field in fields(module)}:
            raise
        raise SettingsError(f"data.corpora.{corpus}.{own}{str(error)[len(error.setting) :]}") from error
