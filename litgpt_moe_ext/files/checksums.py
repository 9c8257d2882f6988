"""Checksums of the files of checkpoints and corpora, as `sha256sum` writes them: `sha256sum -c SHA256SUMS` checks them.

The archive that `torch.save` writes has a CRC of every record, but the files beside it (configurations, tokenizer, an
averaged model) and shards of tokens have none. If they were damaged, a run would silently train something else.
"""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

FILE_NAME = "SHA256SUMS"
_STORAGES = "data"  # folder of storages in the archive
# A backslash before the line marks a name with escapes, an asterisk binary mode.
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = {escape: character for character, escape in _ESCAPES.items()}
# Errors for an archive that is cut off or unreadable, or whose damaged header names an unknown compression.
_UNREADABLE = (zipfile.BadZipFile, EOFError, OSError, NotImplementedError)


def write(directory: Path, leave_out: Collection[str] = ()) -> None:
    """Write the checksums of all files in `directory`, at any depth, except those with a name in `leave_out`."""
    lines = [_line(sha256_of(directory / name), name) for name in _names(directory, leave_out)]
    (directory / FILE_NAME).write_text("".join(lines), encoding="utf-8")


def _line(digest: str, name: str) -> str:
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    return f"{digest}  {name}\n" if escaped == name else f"\\{digest}  {escaped}\n"


def read(directory: Path) -> dict[str, str]:
    """Return the checksums in `directory` by file name.

    Raises:
        ValueError: If they cannot be read; the message says why.
    """
    try:
        text = (directory / FILE_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{FILE_NAME} cannot be read ({error})") from error
    listed = {}
    # Not `splitlines`, because file names may contain other line separators.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        if (match := _LINE.fullmatch(line)) is None:
            raise ValueError(f"{FILE_NAME} is damaged in line {number}")
        escapes, digest, name = match.groups()
        if escapes:
            name = re.sub(r"\\.", lambda found: _ESCAPED.get(found[0], found[0]), name)
        listed[name] = digest
    return listed


def problem_with(
    directory: Path, required: tuple[str, ...] = (), only: str | None = None, archive: str | None = None
) -> str | None:
    """Return which file is missing or differs from its checksum, or None if all are unchanged.

    Args:
        directory: A directory with checksums.
        required: Files that must have a checksum.
        only: The only file to check; by default all.
        archive: Name, in any folder, of `torch.save` archives too large to read; `problem_with_names` checks them
            instead.
    """
    try:
        listed = read(directory)
    except ValueError as error:
        return str(error)
    if missing := [name for name in required if name not in listed]:
        return f"{FILE_NAME} does not list {', '.join(missing)}"
    for name, digest in listed.items():
        if only not in (None, name):
            continue
        try:
            if Path(name).name == archive and (directory / name).is_file():
                if problem := problem_with_names(directory / name):
                    return f"in {name}: {problem}"
            elif sha256_of(directory / name) != digest:
                return f"{name} differs from its checksum in {FILE_NAME}"
        except (OSError, ValueError) as error:  # ValueError: a damaged name that no file can have
            return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def problem_inside(file: Path) -> str | None:
    """Return which record of a `torch.save` archive does not match its CRC, or None if all do."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except _UNREADABLE as error:
        return f"{file.name} is truncated or damaged ({error})"
    return None if damaged is None else f"{file.name} is damaged in its record {damaged}"


def problem_with_names(file: Path) -> str | None:
    """Return why the names and shapes in a `torch.save` archive do not match their CRCs, or None if they do.

    Storages are not read, as they may include an optimizer that is not needed.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if Path(name).parent.name != _STORAGES:
                    archive.read(name)
    except _UNREADABLE as error:
        return f"{file.name} is truncated or damaged ({error})"
    return None


def problem_with_storages(file: Path, content: Mapping[str, memoryview]) -> str | None:
    """Return which of the given storages of a `torch.save` archive does not match its CRC, or None if all do.

    Args:
        file: The archive.
        content: Bytes of whole storages, as read, by the names to report.
    """
    with zipfile.ZipFile(file) as archive:
        records = {(record.file_size, record.CRC) for record in archive.infolist()}
    damaged = (name for name, stored in content.items() if (stored.nbytes, zlib.crc32(stored)) not in records)
    name = next(damaged, None)
    return None if name is None else f"{file.name} is damaged in {name}"


def _names(directory: Path, leave_out: Collection[str]) -> list[str]:
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name != FILE_NAME and name not in leave_out)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 (hex) of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
