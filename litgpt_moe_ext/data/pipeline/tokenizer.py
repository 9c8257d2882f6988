"""Training and opening BPE tokenizers.

A tokenizer directory holds the two files that LitGPT copies beside every checkpoint and that `transformers` reads as
well: `tokenizer.json` and `tokenizer_config.json`. This module needs neither of the two libraries.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from litgpt_moe_ext.errors import SettingsError

EOS_TOKEN = "<|endoftext|>"
LARGEST_VOCABULARY = 1 << 24
_BYTES = 256
# GPT-2's division of text into words with their leading space, numbers, punctuation and white space.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_parallelism_is_ours = False  # whether TOKENIZERS_PARALLELISM holds our value rather than a choice of the user


@dataclass(frozen=True, slots=True)
class BPESettings:
    """What a BPE tokenizer is trained for.

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
                f"{len(self.special_tokens)} special token(s) take {smallest} entries; set vocab_size to {smallest} or "
                "more"
            )


def train_bpe(texts: Iterable[str], settings: BPESettings, directory: str | os.PathLike) -> Tokenizer:
    """Train a BPE tokenizer and write its directory.

    Every text round-trips: all 256 bytes are in the vocabulary, nothing is normalised, no prefix space is added. No
    special token is added to a text by default. The same texts give the same files.

    Args:
        texts: The documents to learn merges from.
        settings: The vocabulary.
        directory: Where to write; created if missing.

    Raises:
        SettingsError: The settings cannot work.
    """
    settings.check()
    with threads_for_tokenizers():
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


def _train_on_characters(texts: Iterable[str], settings: BPESettings) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=settings.unk_token, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    free = settings.vocab_size - _BYTES
    trainer = trainers.BpeTrainer(
        vocab_size=free,
        special_tokens=list(settings.special_tokens),
        # Rare characters cost an entry each; as bytes they cost a few tokens each time.
        limit_alphabet=min(1000, free // 4),
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


def open_for_documents(directory: str | os.PathLike) -> Tokenizer:
    """Open a tokenizer for encoding documents rather than prompts.

    Text such as `<|endoftext|>` inside a document stays ordinary text instead of becoming the special id, which would
    end the document in its middle. Truncation and padding settings of the file are switched off. Encode with
    `add_special_tokens=False`.

    Raises:
        SettingsError: The directory has no `tokenizer.json`, or it is damaged.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise SettingsError(f"{path} does not exist; a tokenizer directory needs a tokenizer.json")
    tokenizer = parse_tokenizer(path.read_bytes(), str(path))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Return the tokenizer in the content of a `tokenizer.json`.

    Args:
        content: The file.
        name: What to call it in error messages.

    Raises:
        SettingsError: It is damaged.
    """
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise SettingsError(f"{name} is not a tokenizer ({error}); download or make it again") from error


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the highest id, which with gaps between the ids is more than the number of tokens.

    Raises:
        SettingsError: The highest id is so large that no model has an embedding for it.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    size = 1 + max(ids.values(), default=-1)
    if size > LARGEST_VOCABULARY:
        token = max(ids, key=ids.__getitem__)
        raise SettingsError(
            f"tokenizer_dir: token {token!r} has id {size - 1} in a tokenizer of {len(ids)} tokens, which would need "
            f"an embedding of {size} rows; give it an id below {LARGEST_VOCABULARY} in tokenizer.json"
        )
    return size


def require_eos(directory: str | os.PathLike) -> int:
    """Return the id of the token that ends a document; see `require_token`."""
    return require_token(directory, "eos", "end-of-sequence", "documents cannot be kept apart")


def require_bos(directory: str | os.PathLike) -> int:
    """Return the id of the token that starts a document; see `require_token`."""
    return require_token(directory, "bos", "beginning-of-sequence", "none can be put before a document")


def require_token(directory: str | os.PathLike, kind: str, name: str, consequence: str) -> int:
    """Return the id of a special token of a tokenizer directory.

    Looks where LitGPT looks: `<kind>_token` in `tokenizer_config.json`, then `<kind>_token_id` in
    `generation_config.json`.

    Args:
        directory: The tokenizer directory.
        kind: `eos` or `bos`.
        name: What to call the token in error messages.
        consequence: What does not work without it.

    Raises:
        SettingsError: There is no `tokenizer.json`, no file names the token, or it is not in the vocabulary.
    """
    directory = Path(directory)
    tokenizer = open_for_documents(directory)
    config_path = directory / "tokenizer_config.json"
    token = _read_json(config_path).get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        token_id = tokenizer.token_to_id(token) if isinstance(token, str) and _is_unicode(token) else None
        if token_id is None:
            raise SettingsError(
                f"{config_path} names {kind}_token {token!r}, which is not in the vocabulary of tokenizer.json; "
                "name a token of the vocabulary"
            )
        return token_id
    token_id = _read_json(directory / "generation_config.json").get(f"{kind}_token_id")
    if isinstance(token_id, list):
        token_id = token_id[0] if token_id else None
    if token_id is None:
        raise SettingsError(
            f"tokenizer_dir: {str(directory)!r} has no {name} token, so {consequence}; add "
            f'"{kind}_token": "<a token of the vocabulary>" (and "tokenizer_class": "PreTrainedTokenizerFast") to '
            f"{config_path}"
        )
    if not isinstance(token_id, int) or not 0 <= token_id < 2**32 or tokenizer.id_to_token(token_id) is None:
        raise SettingsError(
            f"{directory / 'generation_config.json'} names {kind}_token_id {token_id!r}, outside the "
            "vocabulary; name an id of the vocabulary"
        )
    return token_id


@contextmanager
def threads_for_tokenizers() -> Iterator[None]:
    """Let the `tokenizers` library use all cores inside the block, and never in processes forked afterwards.

    Its thread pool does not survive a fork. Left alone the library prints a warning in every forked worker; saying
    "false" once the work is done keeps it quiet and safe. A value of TOKENIZERS_PARALLELISM set by the user is left
    as it is.
    """
    global _parallelism_is_ours
    if "TOKENIZERS_PARALLELISM" in os.environ and not _parallelism_is_ours:
        yield
        return
    _parallelism_is_ours = True
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        return False
    return True


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid JSON ({error}); repair or replace the file") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds {type(content).__name__}, not an object; repair or replace the file")
    return content
