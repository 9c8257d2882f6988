"""Training BPE tokenizers."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from litgpt_moe_ext.data.tokenizer.threads import threads_for_tokenizers
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.interruption import ending_at_once
from litgpt_moe_ext.wording import counted

EOS_TOKEN = "<|endoftext|>"
_BYTES = 256
_MOST = 10_000_000  # the tokenizers library takes memory for all entries at once, and ends the process if there is none
# GPT-2's division of text into words with their leading space, numbers, punctuation and white space.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class BPESettings:
    """Settings for training a BPE tokenizer.

    Attributes:
        vocab_size: Upper bound on the number of entries; a small text may offer fewer merges.
        special_tokens: Tokens that get the first ids, in this order; at least one.
        eos_token: The one that ends a document; default: the first.
        bos_token: The one that starts a document; default: the EOS token, as in GPT-2, where the end of one
            document is the start of the next.
        unk_token: The one for what is not in the vocabulary, or None. Every byte is in the vocabulary, so it never
            appears in a text.
        byte_mode: `level` turns text into bytes before it merges (GPT-2); `fallback` merges characters, and writes
            rare ones as bytes (Llama 2).
    """

    vocab_size: int
    special_tokens: Sequence[str] = (EOS_TOKEN,)
    eos_token: str | None = None
    bos_token: str | None = None
    unk_token: str | None = None
    byte_mode: Literal["level", "fallback"] = "level"

    def borders(self) -> tuple[int, int]:
        """Return the ids of the tokens that end and begin a document.

        Raises:
            SettingsError: See `check`.
        """
        self.check()
        end = self.eos_token or self.special_tokens[0]
        return self.special_tokens.index(end), self.special_tokens.index(self.bos_token or end)

    def check(self) -> None:
        """Raise SettingsError unless there is room for the 256 bytes and the special tokens, and these fit together."""
        if not self.special_tokens:
            raise SettingsError("special_tokens: [] must name at least the token that ends a document")
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise SettingsError(f"special_tokens: {list(self.special_tokens)} must name each token once")
        for name in ("eos_token", "bos_token", "unk_token"):
            token = getattr(self, name)
            if token is not None and token not in self.special_tokens:
                raise SettingsError(
                    f"{name}: {token!r} must be one of special_tokens {list(self.special_tokens)}; add it there"
                )
        if self.byte_mode not in ("level", "fallback"):
            raise SettingsError(f"byte_mode: {self.byte_mode!r} must be level or fallback")
        smallest = _BYTES + len(self.special_tokens)
        if self.vocab_size < smallest:
            raise SettingsError(
                f"vocab_size: {self.vocab_size} is too small for a byte-level tokenizer, where {_BYTES} bytes and "
                f"{counted(len(self.special_tokens), 'special token')} take {smallest} entries; set vocab_size to "
                f"{smallest} or more"
            )
        if self.vocab_size > _MOST:
            raise SettingsError(f"vocab_size: {self.vocab_size} must be at most {_MOST}; usual are 2048 to 262144")


def train_bpe(texts: Iterable[str], settings: BPESettings, directory: str | os.PathLike) -> Tokenizer:
    """Train a BPE tokenizer and write its directory.

    Every text round-trips: all 256 bytes are in the vocabulary, nothing is normalised, no prefix space is added. No
    special token is added to a text by default. The same texts give the same files.

    Args:
        texts: The documents to learn merges from; for `byte_mode: fallback` they are gone through twice, and those of
            an iterator kept in memory.
        settings: The vocabulary.
        directory: Where to write; created if missing.

    Raises:
        SettingsError: The settings cannot work.
    """
    settings.check()
    with threads_for_tokenizers(), ending_at_once():
        train = _train_on_bytes if settings.byte_mode == "level" else _train_on_characters
        tokenizer = train(texts, settings)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Not tokenizer.save, whose error on a full disk is a plain Exception.
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    eos_token = settings.eos_token or settings.special_tokens[0]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # LitGPT requires the key, transformers acts on it
        "bos_token": settings.bos_token or eos_token,
        "eos_token": eos_token,
        "unk_token": settings.unk_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # the clean-up would change "a , b" and so break the round trip
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def _train_on_bytes(texts: Iterable[str], settings: BPESettings) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=settings.unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _most_frequent(texts: Iterable[str], most: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return sorted(counts, key=lambda character: (-counts[character], character))[:most]


def _train_on_characters(texts: Iterable[str], settings: BPESettings) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=settings.unk_token, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    free = settings.vocab_size - _BYTES
    texts = list(texts) if isinstance(texts, Iterator) else texts
    # Rare characters cost an entry each; as bytes they cost a few tokens each time.
    alphabet = _most_frequent(texts, min(1000, free // 4))
    trainer = trainers.BpeTrainer(
        vocab_size=free,
        special_tokens=list(settings.special_tokens),
        # Otherwise the trainer chooses randomly among equally frequent characters.
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer knows no byte tokens. As special tokens they would be matched in texts, so they enter here, between
    # the special tokens and the others; merges refer to tokens by name.
    state = json.loads(tokenizer.to_str())
    learned = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)[len(settings.special_tokens) :]
    tokens = [*settings.special_tokens, *(f"<0x{byte:02X}>" for byte in range(_BYTES)), *learned]
    state["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    return Tokenizer.from_str(json.dumps(state))
