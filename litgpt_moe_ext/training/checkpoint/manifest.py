"""Checksums of a checkpoint's files, in the format of `sha256sum`: `sha256sum -c SHA256SUMS` checks them as well.

The archive that `torch.save` writes has a CRC of every record, but the files beside it (configurations, tokenizer, an
averaged model) have none, and reading them wrong would train something else without a word.
"""

import hashlib
from pathlib import Path

FILE_NAME = "SHA256SUMS"


def write(directory: Path) -> None:
    """Write the checksums of all files in `directory`, at any depth."""
    lines = [f"{_digest(directory / name)}  {name}\n" for name in _names(directory)]
    (directory / FILE_NAME).write_text("".join(lines), encoding="utf-8")


def problem_with(directory: Path) -> str | None:
    """Return which file is missing or differs from its checksum, or None if all are as they were written."""
    for line in (directory / FILE_NAME).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        try:
            if _digest(directory / name) != digest:
                return f"{name} differs from its checksum in {FILE_NAME}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def _names(directory: Path) -> list[str]:
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name != FILE_NAME)


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
