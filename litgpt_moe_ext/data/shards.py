"""Token shard files: a 256-word header followed by the token ids.

The layout is the one of llm.c's data scripts (https://github.com/karpathy/llm.c, ``dev/data``): 256 little-endian int32
words, of which the first three are magic number, version and token count, then the tokens.

====================  ========  =======  ==========
magic                 version   tokens   vocabulary
====================  ========  =======  ==========
20240520 (GPT-2)      1         uint16   up to 65,536
20240801 (Llama 3)    7         uint32   larger
====================  ========  =======  ==========

A header makes the two ways in which raw files go wrong visible: a truncated copy and a wrong integer width.
"""

import os
import uuid
from pathlib import Path

import numpy as np

HEADER_WORDS = 256
HEADER_BYTES = HEADER_WORDS * 4
MAX_UINT16_VOCAB = 1 << 16

_FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_EVAL_MAGIC = 20240522  # llm.c's multiple-choice files share the suffix and hold no training text


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the on-disk integer type for a vocabulary: uint16 up to 65,536 entries, uint32 above."""
    return np.dtype("<u2") if vocab_size <= MAX_UINT16_VOCAB else np.dtype("<u4")


def write_shard(path: str | os.PathLike, tokens: np.ndarray, vocab_size: int) -> None:
    """Writes one shard so that `path` either holds all of it or is left as it was.

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
        raise ValueError(f"{path}: tokens must be a 1-D integer array, got shape {tokens.shape}, dtype {tokens.dtype}.")
    if tokens.size == 0:
        raise ValueError(f"{path}: refusing to write a shard without tokens.")
    if tokens.size >= 2**31:
        raise ValueError(f"{path}: {tokens.size} tokens exceed the header's int32 count; split into several shards.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{path}: token ids span {low}..{high}, outside a vocabulary of {vocab_size} entries.")

    dtype = token_dtype(vocab_size)
    magic, version = next((magic, version) for magic, (version, kind) in _FORMATS.items() if kind == dtype)
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = magic, version, tokens.size

    # Same folder, because only a rename within one file system is atomic.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype=dtype).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_shard(path: str | os.PathLike) -> np.memmap:
    """Maps a shard into memory, read-only.

    Returns:
        The token ids, shape (N,), dtype uint16 or uint32 as the header says. Nothing is read until it is indexed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no shard, is truncated, is empty, or its header contradicts its size.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(
            f"{path} is truncated or no token shard: it has {size} bytes, the header alone takes {HEADER_BYTES}. "
            "Prepare or download it again."
        )
    header = np.fromfile(path, dtype="<i4", count=3)
    magic, version, count = (int(word) for word in header)
    if magic == _EVAL_MAGIC:
        raise ValueError(f"{path} has magic {magic}: a multiple-choice evaluation file, not training tokens.")
    if magic not in _FORMATS:
        known = ", ".join(str(known_magic) for known_magic in _FORMATS)
        raise ValueError(
            f"{path} has the wrong magic number {magic}; a token shard starts with one of {known}. "
            "A file of raw tokens without a header has to be converted first."
        )
    expected_version, dtype = _FORMATS[magic]
    if version != expected_version:
        raise ValueError(f"{path} has version {version} under magic {magic}; only version {expected_version} is known.")
    if count <= 0:
        raise ValueError(f"{path} is empty: its header counts {count} tokens. Prepare or download it again.")
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        found = (size - HEADER_BYTES) / dtype.itemsize
        state = "is truncated" if size < expected else "is longer than its header says"
        raise ValueError(
            f"{path} {state}: the header counts {count} tokens ({expected} bytes), the file has {size} bytes "
            f"({found:g} tokens). Prepare or download it again."
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
