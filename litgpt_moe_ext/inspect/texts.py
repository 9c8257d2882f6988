"""Text to look at a model with: files, or what a prepared data set holds, as tokens with their places in the text."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from litgpt_moe_ext.data.pipeline.shards import open_shard

VALIDATION_SHARD = "val.bin"


class Document(NamedTuple):
    """A text and where it comes from."""

    name: str
    text: str


class EncodedDocument(NamedTuple):
    """A text as tokens.

    Attributes:
        name: Where it comes from.
        text: The text.
        ids: Its N tokens.
        spans: First character and the one after the last of each token. (A token of a part of a character has that
            character's.)
    """

    name: str
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def read_files(paths: Sequence[Path]) -> Iterator[Document]:
    """Read text files.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If one is not UTF-8.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"text: {str(path)!r} is not a file")
        try:
            yield Document(str(path), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"text: {str(path)!r} is not UTF-8: {error}") from error


def open_tokens(data: Path):
    """Open a token shard, or the validation shard of a prepared corpus.

    Args:
        data: A shard file, or a folder with `val.bin`.

    Returns:
        (N,) memory-mapped token ids.

    Raises:
        FileNotFoundError: If there is no such file, or none in the folder.
        ValueError: If it is no shard.
    """
    path = data / VALIDATION_SHARD if data.is_dir() else data
    if not path.is_file():
        raise FileNotFoundError(
            f"data: {str(path)!r} does not exist; name a token shard, or the folder of a prepared corpus with its "
            f"{VALIDATION_SHARD}"
        )
    return open_shard(path)


def shard_documents(tokens: Iterable[int], tokenizer, name: str) -> Iterator[Document]:
    """Decode a shard, document by document.

    Args:
        tokens: Token ids, in which the end-of-text token separates documents.
        tokenizer: The `litgpt.Tokenizer` they were made with.
        name: Of the shard.
    """
    documents = itertools.groupby((int(token) for token in tokens), key=lambda token: token == tokenizer.eos_id)
    texts = (list(ids) for is_separator, ids in documents if not is_separator)
    for i, ids in enumerate(texts):
        yield Document(f"{name}:{i}", tokenizer.processor.decode(ids, skip_special_tokens=False))


def encode(documents: Iterable[Document], tokenizer, max_tokens: int) -> list[EncodedDocument]:
    """Tokenize until there are `max_tokens` tokens; the last document is cut there.

    Raises:
        ValueError: If the tokenizer does not say where tokens lie in the text, or there is no text.
    """
    if tokenizer.backend != "huggingface":
        raise ValueError("the checkpoint's tokenizer is a SentencePiece model, which does not tell tokens' places")
    encoded, total = [], 0
    for document in documents:
        encoding = tokenizer.processor.encode(document.text, add_special_tokens=False)
        room = max_tokens - total
        if ids := encoding.ids[:room]:
            encoded.append(EncodedDocument(document.name, document.text, ids, encoding.offsets[:room]))
            total += len(ids)
        if total >= max_tokens:
            break
    if not encoded:
        raise ValueError("there is no text to analyse; give --text FILE or --data SHARD with at least one token")
    return encoded
