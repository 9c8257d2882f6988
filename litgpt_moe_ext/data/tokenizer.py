"""Training and opening byte-level BPE tokenizers.

A tokenizer directory holds the two files that LitGPT copies beside every checkpoint and that ``transformers`` reads as
well: ``tokenizer.json`` and ``tokenizer_config.json``. This module needs neither of the two libraries.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS_TOKEN = "<|endoftext|>"
_BYTES = 256
_parallelism_is_ours = False  # whether TOKENIZERS_PARALLELISM holds our value rather than a choice of the user


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str] = (EOS_TOKEN,)) -> None:
    """Raises ValueError unless the vocabulary has room for the 256 bytes and the special tokens."""
    smallest = _BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: {_BYTES} bytes and "
            f"{len(special_tokens)} special token(s) take {smallest} entries. Set vocab_size to {smallest} or more."
        )


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    directory: str | os.PathLike,
    special_tokens: Sequence[str] = (EOS_TOKEN,),
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer and writes its directory.

    Every text round-trips: all 256 bytes are in the vocabulary, nothing is normalised, no prefix space is added. For
    that reason there is no unknown token. The special tokens get the first ids, in the given order; the first one
    ends a document and doubles as BOS, as in GPT-2, because what starts a document is the end of the one before it.
    It is not added by default. The same texts give the same files.

    Args:
        texts: The documents to learn merges from.
        vocab_size: Upper bound on the number of entries; a small text may offer fewer merges.
        directory: Where to write; created if missing.
        special_tokens: At least one.

    Raises:
        ValueError: `vocab_size` is too small or there is no special token.
    """
    if not special_tokens:
        raise ValueError("special_tokens is empty; name at least the token that ends a document.")
    check_vocab_size(vocab_size, special_tokens)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with threads_for_tokenizers():
        tokenizer.train_from_iterator(texts, trainer)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # LitGPT requires the key, transformers acts on it
        "bos_token": special_tokens[0],
        "eos_token": special_tokens[0],
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # the clean-up would change "a , b" and so break the round trip
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def open_for_documents(directory: str | os.PathLike) -> Tokenizer:
    """Opens a tokenizer for encoding documents rather than prompts.

    Text such as ``<|endoftext|>`` inside a document stays ordinary text instead of becoming the special id, which would
    end the document in its middle. Truncation and padding settings of the file are switched off. Encode with
    ``add_special_tokens=False``.

    Raises:
        FileNotFoundError: The directory has no ``tokenizer.json``.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a tokenizer directory needs a tokenizer.json.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_eos(directory: str | os.PathLike) -> int:
    """Returns the id of the end-of-sequence token of a tokenizer directory.

    Looks where LitGPT looks: ``eos_token`` in ``tokenizer_config.json``, then ``eos_token_id`` in
    ``generation_config.json``.

    Raises:
        FileNotFoundError: The directory has no ``tokenizer.json``.
        ValueError: No file names an EOS token, or it is not in the vocabulary.
    """
    directory = Path(directory)
    tokenizer = open_for_documents(directory)
    config_path = directory / "tokenizer_config.json"
    token = _read_json(config_path).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"{config_path} names eos_token {token!r}, which is not in the vocabulary of tokenizer.json. "
                "Name a token of the vocabulary."
            )
        return token_id
    token_id = _read_json(directory / "generation_config.json").get("eos_token_id")
    if isinstance(token_id, list):
        token_id = token_id[0] if token_id else None
    if token_id is None:
        raise ValueError(
            f"The tokenizer in {directory} has no end-of-sequence token, so documents cannot be kept apart. Add "
            f'"eos_token": "<a token of the vocabulary>" (and "tokenizer_class": "PreTrainedTokenizerFast") to '
            f"{config_path}."
        )
    if tokenizer.id_to_token(token_id) is None:
        raise ValueError(
            f"{directory / 'generation_config.json'} names eos_token_id {token_id}, outside the vocabulary."
        )
    return token_id


@contextmanager
def threads_for_tokenizers() -> Iterator[None]:
    """Lets the ``tokenizers`` library use all cores inside the block, and never in processes forked afterwards.

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


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Repair or replace the file.") from error
