"""Texts for inspecting a model, from files or a prepared dataset, as tokens with their positions in the text."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from litgpt_moe_ext.data.modules.token_shards import TokenShards
from litgpt_moe_ext.data.pipeline.shards import open_shard
from litgpt_moe_ext.data.pipeline.store.finished import TOKENIZER_DIR
from litgpt_moe_ext.data.tokenizer.opening import parse_tokenizer
from litgpt_moe_ext.errors import SettingsError, did_you_mean_inside
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt import Tokenizer
    from tokenizers import Tokenizer as HuggingFaceTokenizer

VALIDATION_SHARDS = "val*.bin"


class Document(NamedTuple):
    """A text and where it comes from."""

    name: str
    text: str


class EncodedDocument(NamedTuple):
    """A text as tokens.

    Attributes:
        name: Where it comes from.
        text: The text.
        ids: Its tokens.
        spans: First character of each token and the one after its last; a token of part of a character has the span of
            the whole character.
    """

    name: str
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def require_one_source(text: Sequence[Path] | None, data: Path | None) -> None:
    """Raise SettingsError unless either text files or a shard is given."""
    if (text is None) == (data is None):
        raise SettingsError("text, data: exactly one must be given, --text FILE ... or --data SHARD")


def read_files(paths: Sequence[Path]) -> Iterator[Document]:
    """Read text files.

    Raises:
        SettingsError: If one does not exist or is not UTF-8.
    """
    for path in paths:
        if not path.is_file():
            raise SettingsError(f"text: {quoted(path)} must be a file")
        try:
            yield Document(str(path), path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"text: {quoted(path)} must be plain text in UTF-8: {error}; of other data, name the folder that a "
                "training has prepared with --data"
            ) from error


def open_tokens(data: Path, tokenizer: "Tokenizer") -> np.ndarray:
    """Open a token shard, or the validation shards of a folder, such as a prepared corpus.

    Args:
        data: A shard file, or a folder with `val*.bin`, or with shards of which a training would validate on some.
        tokenizer: The model's tokenizer, which a prepared corpus must use; other shards do not record theirs.

    Returns:
        (N,) token ids, memory-mapped where they are in one file.

    Raises:
        SettingsError: If there is no such file, the folder has none, it is not a shard, or its tokens are another
            tokenizer's.
    """
    paths = [data] if data.is_file() else sorted(data.glob(VALIDATION_SHARDS)) or _to_validate(data)
    if not (paths and paths[0].is_file()):
        hint = did_you_mean_inside(data, VALIDATION_SHARDS) or ", as of a prepared corpus"
        raise SettingsError(f"data: {quoted(data)} must be a token shard, or a folder with {VALIDATION_SHARDS}{hint}")
    _require_tokenizer(paths[0].parent / TOKENIZER_DIR / "tokenizer.json", tokenizer)
    shards = [open_shard(path) for path in paths]
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def _to_validate(folder: Path) -> list[Path]:
    try:
        return TokenShards(data_path=folder).find_shards()[1]
    except SettingsError:  # about settings of a training
        return []


def _require_tokenizer(file: Path, tokenizer: "Tokenizer") -> None:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    own = tokenizer.processor
    if not (file.is_file() and isinstance(own, HuggingFaceTokenizer)):
        return
    if parse_tokenizer(file.read_bytes(), f"data: {quoted(file)}").get_vocab() != own.get_vocab():
        raise SettingsError(
            f"data: {quoted(file.parent.parent)} was prepared with another tokenizer than the checkpoint's, so its ids "
            "are other text; name the corpus that it was trained on, or give --text FILE ..."
        )


def processor_of(tokenizer: "Tokenizer") -> "HuggingFaceTokenizer":
    """Return the tokenizer of Hugging Face's library inside LitGPT's.

    Raises:
        SettingsError: If it is of another library, which gives no positions of tokens in the text.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    if not isinstance(tokenizer.processor, HuggingFaceTokenizer):
        raise SettingsError(
            "checkpoint_dir: its tokenizer must be a tokenizer.json; SentencePiece tokens have no place in the text"
        )
    return tokenizer.processor


def shard_documents(tokens: Iterable[int], tokenizer: "Tokenizer", name: str) -> Iterator[Document]:
    """Decode a shard, document by document.

    Args:
        tokens: Token ids, in which the end-of-text token separates documents.
        tokenizer: The tokenizer that encoded them.
        name: Name of the shard.
    """
    documents = itertools.groupby((int(token) for token in tokens), key=lambda token: token == tokenizer.eos_id)
    texts = (list(ids) for is_separator, ids in documents if not is_separator)
    for i, ids in enumerate(texts):
        yield Document(f"{name}:{i}", processor_of(tokenizer).decode(ids, skip_special_tokens=False))


def encode(documents: Iterable[Document], tokenizer: "Tokenizer", max_tokens: int) -> list[EncodedDocument]:
    """Tokenize until there are `max_tokens` tokens; the last document is cut there.

    Raises:
        SettingsError: If the tokenizer gives no positions of tokens in the text, or there is no text.
    """
    processor, encoded, total = processor_of(tokenizer), [], 0
    for document in documents:
        encoding = processor.encode(document.text, add_special_tokens=False)
        room = max_tokens - total
        if ids := encoding.ids[:room]:
            encoded.append(EncodedDocument(document.name, document.text, ids, encoding.offsets[:room]))
            total += len(ids)
        if total >= max_tokens:
            break
    if not encoded:
        raise SettingsError("text, data: there must be at least one token of text; give another --text or --data")
    return encoded
