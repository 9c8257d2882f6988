"""Corpora as LitGPT data modules: prepared once into token shards, then read from these."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from litgpt_moe_ext.data.corpora.base import Corpus, full_docstring
from litgpt_moe_ext.data.modules.base import ShardModule, is_first_rank
from litgpt_moe_ext.data.packing import document_lengths, first_documents, pack
from litgpt_moe_ext.data.pipeline.store.finished import TOKENIZER_DIR, key_of, open_corpus, read_manifest
from litgpt_moe_ext.data.tokenizer.opening import parse_tokenizer
from litgpt_moe_ext.data.windows import DocumentWindows, StreamWindows, Windows
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.tokens.padding import accept_padding
from litgpt_moe_ext.wording import quoted


class CorpusModule(Corpus, ShardModule):
    """The base class that turns a corpus into a LitGPT data module; see `as_data_module`.

    For LitGPT to use the corpus' tokenizer, and copy it into checkpoints, an entry point calls `prepare_tokenizer`
    before `connect`. Without a tokenizer in `connect`, as in `litgpt pretrain` without a tokenizer directory, training
    works, but no tokenizer is copied.

    Attributes:
        corpus_path: The prepared corpus; None before it is prepared.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        ShardModule.__post_init__(self)
        self.corpus_path: Path | None = None
        self._facts: dict[str, Any] | None = None
        self._model_documents: tuple[str, int] | None = None

    def prepare_tokenizer(self) -> Path:
        """Prepare the corpus if needed and return the tokenizer directory."""
        self.prepare_data()
        return self._prepared() / TOKENIZER_DIR

    def prepare_data(self) -> None:
        """Prepare the corpus unless it is already prepared.

        Raises:
            SettingsError: The tokenizer given to `connect` is not the corpus', the vocabulary exceeds the one given to
                `require_vocabulary`, documents do not begin or end as given to `require_documents`, or a setting or a
                file is wrong.
        """
        if self.corpus_path is None:
            self.corpus_path = self.prepare(is_first_rank(), self.tokenizer)
        self._check_tokenizer()
        self._check_vocabulary()
        self._check_documents()

    def open_shards(self) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """See `ShardModule.open_shards`."""
        self._facts = None  # may be from an earlier run in this process
        self.prepare_data()  # finds the existing result, possibly prepared by rank 0 alone
        manifest = self.manifest
        train, val = (
            shards if count is None else first_documents(shards, count, manifest["eos_id"], manifest["bos_id"])
            for shards, count in zip(open_corpus(self._prepared()), self.document_limits, strict=True)
        )
        return train, val

    @property
    def pads(self) -> bool:
        """See `TokenModule.pads`."""
        return self.packing != "stream"

    def windows(self, shards: Sequence[np.ndarray], name: str) -> Windows:
        """See `ShardModule.windows` and `packing`."""
        if not self.pads:
            return StreamWindows(shards, self.max_seq_length, name)
        accept_padding()
        manifest = self.manifest
        lengths = document_lengths(shards, manifest["eos_id"], manifest["bos_id"])
        packing = pack(lengths, self.max_seq_length, together=self.packing == "best_fit")
        return DocumentWindows(shards, packing, self.max_seq_length, name)

    def require_vocabulary(self, padded_vocab_size: int) -> None:
        """See `TokenModule.require_vocabulary`; checked before any preparation if the settings determine the size.

        The ids were checked against the vocabulary when they were written.
        """
        self._model_vocab_size = padded_vocab_size
        if self.corpus_path is not None:
            self._check_vocabulary()
        elif (planned := self.planned_vocabulary()) is not None and planned[1] > padded_vocab_size:
            raise SettingsError(
                f"{planned[0]} means {planned[1]} tokens, more than the model's padded_vocab_size of "
                f"{padded_vocab_size}; set model_config.padded_vocab_size to {planned[1]} or more, or choose a smaller "
                "vocabulary"
            )

    def require_documents(self, boundary: str, token_id: int) -> None:
        """See `TokenModule.require_documents`; checked before any preparation if the settings determine the tokens."""
        self._model_documents = (boundary, token_id)
        if self.corpus_path is not None:
            self._check_documents()
        elif (planned := self.planned_borders()) is not None:
            self._check_borders(*planned, "the corpus to be prepared")

    @property
    def corpus_id(self) -> str:
        """The key of the corpus, how much of it is read, and how it is packed."""
        documents, _ = self.document_limits
        parts = [key_of(self.manifest), *([] if documents is None else [f"{documents} documents"])]
        return ":".join(parts if self.packing == "stream" else [*parts, self.packing])

    @property
    def unigram_loss(self) -> float | None:
        """Validation loss, in nats per token, of a model that knows only token frequencies.

        None if only a part of the corpus is read.
        """
        return None if any(self.document_limits) else self.manifest["unigram_val_loss"]

    def _prepared(self) -> Path:
        if self.corpus_path is None:
            raise RuntimeError("Call prepare_data() first.")
        return self.corpus_path

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the prepared corpus."""
        # Read once: if the corpus is deleted during training, its open files remain readable, but this file would not.
        self._facts = self._facts or read_manifest(self._prepared())
        assert self._facts is not None
        return self._facts

    def _check_vocabulary(self) -> None:
        vocab_size = self.manifest["vocab_size"]
        if self._model_vocab_size is not None and vocab_size > self._model_vocab_size:
            raise SettingsError(
                f"data: the corpus in {self.corpus_path} has a vocabulary of {vocab_size} tokens, more than the "
                f"model's padded_vocab_size of {self._model_vocab_size}; set model_config.padded_vocab_size to "
                f"{vocab_size} or more, or prepare the corpus with a smaller vocabulary"
            )

    def _check_documents(self) -> None:
        eos_id, bos_id = (self.manifest[name] for name in ("eos_id", "bos_id"))
        self._check_borders(eos_id, bos_id, f"the corpus in {self.corpus_path}")

    def _check_borders(self, eos_id: int, bos_id: int | None, corpus: str) -> None:
        if self._model_documents is None:
            return
        boundary, token_id = self._model_documents
        # Without a BOS token, EOS may count as the beginning of the next document.
        expected = eos_id if boundary == "eos" or bos_id is None else bos_id
        if token_id != expected:
            raise SettingsError(
                f"model_config.attention_document_token_id: {token_id} must be {expected}, the {boundary} token of "
                f"{corpus}"
            )
        if boundary == "eos" and eos_id == bos_id:
            raise SettingsError(
                f"model_config.attention_document_boundary: eos must be bos for {corpus}, where token {eos_id} both "
                "begins and ends a document: each beginning would be a document of its own"
            )

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            return
        directory, processor = self._prepared() / TOKENIZER_DIR, self.tokenizer.processor
        # LitGPT's Tokenizer does not keep its path, and the same tokenizer may come from a copy.
        given = processor.to_str().encode() if isinstance(processor, HFTokenizer) else b""
        contents = given, (directory / "tokenizer.json").read_bytes()
        if not given or len({parse_tokenizer(content, "tokenizer.json").to_str() for content in contents}) > 1:
            raise SettingsError(
                f"tokenizer_dir: {self.tokenizer.model_name!r} is not the tokenizer that encoded this corpus, so its "
                f"ids would mean other text; set tokenizer_dir to {quoted(directory)}, or leave it out"
            )


def as_data_module(corpus: type[Corpus]) -> type[CorpusModule]:
    """Return a corpus as a LitGPT data module: a class with the same name, settings and documentation."""
    namespace = {"__module__": "litgpt_moe_ext.data", "__doc__": full_docstring(corpus)}
    return type(corpus.__name__, (corpus, CorpusModule), namespace)
