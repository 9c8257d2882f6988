"""Finished corpora that were damaged later, as by a copy that went wrong: shards of the right size with other tokens.

Each file is compared with its checksum when a corpus is first used in a place, and again after a change of the file.
"""

import os
import shlex
from pathlib import Path

from litgpt_moe_ext.data.pipeline.sources import FileHashes
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums

_LARGE_BYTES = 4_000_000_000  # read in some seconds


def verify(directory: Path, verbose: bool = True) -> None:
    """Compare the files of a finished corpus with their checksums, unless that was done since they last changed.

    What was compared is remembered beside the corpus. Where nothing can be written there, it would have to be done each
    time, so a line says how to do it by hand.

    Args:
        directory: The corpus, whose files are there and have their sizes.
        verbose: Whether to print what takes long, or is not done.

    Raises:
        SettingsError: A file differs from its checksum.
    """
    if not (directory / checksums.FILE_NAME).is_file():  # prepared by an earlier version
        return
    try:
        listed = checksums.read(directory)
    except ValueError as error:
        raise SettingsError(f"{directory}: {error}; {_remedy(directory)}") from error
    hashes = FileHashes(directory.parent)
    files = {directory / name: digest for name, digest in listed.items()}
    new = [file for file in files if not (file.is_file() and hashes.remembers(file))]
    if new and not os.access(directory.parent, os.W_OK):
        if verbose:
            check = f"cd {shlex.quote(str(directory))} && sha256sum -c {checksums.FILE_NAME}"
            print(f"{directory} is not compared with its checksums, as nothing can be written beside it: {check}")
        return
    size = sum(file.stat().st_size for file in new if file.is_file())
    if verbose and size > _LARGE_BYTES:
        print(f"Comparing {size / 1e9:.1f} GB of {directory} with their checksums, this once", flush=True)
    for file, digest in files.items():
        if hashes.hash(file) != digest:
            raise SettingsError(f"{file} differs from its checksum in {checksums.FILE_NAME}; {_remedy(directory)}")
    hashes.save()


def _remedy(directory: Path) -> str:
    return f"copy it again, or delete {directory} to prepare the corpus again"
