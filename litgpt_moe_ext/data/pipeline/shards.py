"""Token shard files: written in one format, read in all common formats.

They are written in the format of llm.c's data scripts (https://github.com/karpathy/llm.c, `dev/data`): 256
little-endian int32 words, the first three of which are magic number, version and token count, then the tokens. The
header reveals the two common faults of raw files: a truncated copy and a wrong integer width.

The format is recognised by a file's bytes, not its name:

| first bytes               | version | tokens         | written by                       |
| ------------------------- | ------- | -------------- | -------------------------------- |
| int32 20240520            | 1       | uint16         | llm.c, modded-nanogpt for GPT-2  |
| int32 20240801            | 7       | uint32         | llm.c for Llama 3                |
| magic of a NumPy file     | any     | uint16, uint32 | build-nanogpt (`np.save`)        |
| anything else             | none    | uint16         | nanoGPT (`ndarray.tofile`)       |
"""

import codecs
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.durable import replacing

HEADER_WORDS = 256
HEADER_BYTES = HEADER_WORDS * 4
MAX_UINT16_VOCAB = 1 << 16

_FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_EVAL_MAGIC = 20240522  # llm.c's multiple-choice files share the suffix and hold no training text
_NUMPY_MAGIC = b"\x93NUMPY"
# Files that end up beside shards and would be mistaken for headerless tokens.
_FOREIGN = {
    b"\x1f\x8b\x08": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
_TEXT_SAMPLE = 64
# If every second one of so many consecutive tokens is low, they are halves of 4-byte ids: text does not look like that.
_WIDE_SAMPLE = 1 << 20
_WIDE_MINIMUM = 32
_HIGH_HALVES = 1 << 2  # of ids below 262,144, which no usual vocabulary exceeds
_SCAN_TOKENS = 1 << 24
_SUM_TOKENS = 1 << 11


def _is_text(start: bytes) -> bool:
    # Token ids whose bytes are all characters would be a coincidence.
    if len(start) < _TEXT_SAMPLE or any(byte < 32 and byte not in b"\t\n\f\r" for byte in start):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # incremental, as the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the on-disk integer type for a vocabulary: uint16 up to 65,536 entries, uint32 above."""
    return np.dtype("<u2") if vocab_size <= MAX_UINT16_VOCAB else np.dtype("<u4")


def write_shard(path: str | os.PathLike, tokens: np.ndarray, vocab_size: int) -> None:
    """Write a shard so that `path` either holds all of it or stays unchanged.

    Args:
        path: The file to write; an existing one is replaced.
        tokens: Token ids, any integer dtype, shape (N,), 0 < N < 2**31.
        vocab_size: Number of entries of the vocabulary; decides the width on disk.

    Raises:
        ValueError: The array is empty, not one-dimensional, not of integers, too long for the header, or holds an id
            outside the vocabulary.
        OSError: The file cannot be written; no partial file is left.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{path}: tokens must be a 1-D integer array, got shape {tokens.shape}, dtype {tokens.dtype}")
    if tokens.size == 0:
        raise ValueError(f"{path}: refusing to write a shard without tokens")
    if tokens.size >= 2**31:
        raise ValueError(f"{path}: {tokens.size} tokens exceed the header's int32 count; split into several shards")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{path}: token ids span {low}..{high}, outside a vocabulary of {vocab_size} entries")

    dtype = token_dtype(vocab_size)
    magic, version = next((magic, version) for magic, (version, kind) in _FORMATS.items() if kind == dtype)
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = magic, version, tokens.size
    with replacing(path) as partial, open(partial, "xb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype=dtype).data)


def open_shard(path: str | os.PathLike) -> np.memmap:
    """Map a shard of any known format into memory, read-only.

    Returns:
        The token ids, shape (N,), dtype uint16 or uint32. Only the header and a sample are read until the array is
        indexed. Its attribute `offset` is the byte where the tokens start.

    Raises:
        SettingsError: The file cannot be read, is not a shard, is truncated, is empty, has an odd number of
            bytes, holds wider integers than its form says, or its header contradicts its size.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(HEADER_BYTES)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    if size == 0:
        raise SettingsError(f"{path} is empty: it has 0 bytes; prepare or download it again")
    if start.startswith(_NUMPY_MAGIC):
        with open(path, "rb") as file:
            return _map(path, size, *_numpy_header(path, file))
    for magic_bytes, kind in _FOREIGN.items():
        if start.startswith(magic_bytes):
            raise SettingsError(f"{path} is {kind}, not a token shard; prepare a corpus from it with TextCorpus")
    magic = int.from_bytes(start[:4], "little", signed=True)
    if magic == _EVAL_MAGIC:
        raise SettingsError(f"{path} has magic {magic}: a multiple-choice evaluation file, not training tokens")
    if magic in _FORMATS:
        return _map(path, size, *_llmc_header(path, start, magic))
    if len(start) == HEADER_BYTES and not any(start[12:]):
        known = ", ".join(str(known_magic) for known_magic in _FORMATS)
        raise SettingsError(f"{path} has a header with the wrong magic number {magic} at byte 0; known are {known}")
    if _is_text(start):
        raise SettingsError(f"{path} is text, not a token shard; prepare a corpus from it with TextCorpus")
    if size % 2:
        raise SettingsError(
            f"{path} has {size} bytes, an odd number, and no header: no whole number of uint16 tokens. The file is "
            "truncated or not a token shard; prepare or download it again"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    sample = tokens[:_WIDE_SAMPLE]
    if len(sample) >= _WIDE_MINIMUM and _is_wide(sample[::2], sample[1::2]):
        raise SettingsError(
            f"{path} has no header and every second uint16 is below {_HIGH_HALVES} (from byte 2 to byte "
            f"{2 * len(sample)}): it holds uint32 tokens; convert it: write_shard(new_path, numpy.fromfile(path, "
            "'<u4'), vocab_size)"
        )
    return tokens


def _is_wide(low: np.ndarray, high: np.ndarray) -> bool:
    """Return whether the tokens at even and at odd places are the halves of wider ids.

    With a large vocabulary, the lower halves may be anything. Otherwise, low tokens at all odd places may also be the
    labels of a synthetic task.
    """
    return not high.any() or (high.max() < _HIGH_HALVES and low.max() >= MAX_UINT16_VOCAB // 2)


def scan_shard(tokens: np.memmap, vocab_size: int | None) -> bytes:
    """Read a shard once, refuse ids outside the vocabulary, and return a fingerprint of all of them.

    It costs little beyond the reading, because it hashes sums of 2,048 tokens at a time. So it detects accidental
    changes, but not deliberate ones.

    Args:
        tokens: A result of `open_shard`, shape (N,).
        vocab_size: Vocabulary size; None does not check ids.

    Raises:
        SettingsError: It holds an id outside the vocabulary; the message has file, position and byte.
    """
    digest = hashlib.sha256(tokens.dtype.str.encode())
    for start in range(0, len(tokens), _SCAN_TOKENS):
        part = tokens[start : start + _SCAN_TOKENS]
        if vocab_size is not None and part.max() >= vocab_size:
            index = start + int(np.argmax(part >= vocab_size))
            raise SettingsError(
                f"{tokens.filename} has token id {tokens[index]} at token {index} (byte "
                f"{tokens.offset + index * tokens.itemsize}), outside a vocabulary of {vocab_size} entries. The shard "
                "was made with another tokenizer, or holds integers of another width: use the tokenizer and the "
                "vocabulary it was made with"
            )
        whole = len(part) // _SUM_TOKENS * _SUM_TOKENS
        digest.update(part[:whole].view("<u8").reshape(-1, _SUM_TOKENS * part.itemsize // 8).sum(1).tobytes())
        digest.update(part[whole:].tobytes())
    return digest.digest()


def _llmc_header(path: Path, start: bytes, magic: int) -> tuple[np.dtype, int, int]:
    """Return dtype, token count and offset of the tokens from the header of an llm.c file."""
    if len(start) < HEADER_BYTES:
        raise SettingsError(
            f"{path} is truncated: it has {len(start)} bytes, its header alone takes {HEADER_BYTES}; prepare or "
            "download it again"
        )
    version, count = (int(word) for word in np.frombuffer(start, "<i4", count=3)[1:])
    expected_version, dtype = _FORMATS[magic]
    if version != expected_version:
        raise SettingsError(
            f"{path} has version {version} at byte 4 under magic {magic}; only version {expected_version} is known"
        )
    if count <= 0:
        raise SettingsError(
            f"{path} is empty: its header counts {count} tokens at byte 8; prepare or download it again"
        )
    return dtype, count, HEADER_BYTES


def _numpy_header(path: Path, file: BinaryIO) -> tuple[np.dtype, int, int]:
    """Return dtype, token count and offset of the tokens from the header of a NumPy file."""
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except Exception as error:  # NumPy parses the header as Python, so damage can raise any parser error
        raise SettingsError(
            f"{path} has a damaged NumPy header, read up to byte {file.tell()} ({error}); prepare or download it again"
        ) from error
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise SettingsError(
            f"{path} holds an array of shape {shape} and dtype {dtype}; a token shard is one-dimensional, uint16 or "
            "uint32; convert it: numpy.save(path, array.astype(numpy.uint16).ravel()), or numpy.uint32 for ids "
            "above 65535"
        )
    if shape[0] == 0:
        raise SettingsError(f"{path} is empty: its header counts 0 tokens; prepare or download it again")
    return dtype, shape[0], file.tell()


def _map(path: Path, size: int, dtype: np.dtype, count: int, offset: int) -> np.memmap:
    expected = offset + count * dtype.itemsize
    if size != expected:
        found = (size - offset) / dtype.itemsize
        state = "is truncated" if size < expected else "is longer than its header says"
        raise SettingsError(
            f"{path} {state}: the header counts {count} tokens ({expected} bytes), the file has {size} bytes "
            f"({found:g} tokens); prepare or download it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
