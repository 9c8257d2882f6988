"""Detects finished corpora that were damaged later, such as by a bad copy: shards of the right size with other tokens.

Each file is compared with its checksum when a corpus is first used in a location, and again after the file has changed.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.wording import in_shell

_LARGE_BYTES = 4_000_000_000  # read in some seconds


def verify(directory: Path, verbose: bool = True) -> None:
    """Compare the files of a finished corpus with their checksums, unless that was done since they last changed.

    A file beside the corpus records what was compared. If it cannot be written, the comparison would be needed every
    time, so instead a message says how to do it by hand.

    Args:
        directory: The corpus, whose files exist and have the right sizes.
        verbose: Whether to print what takes long or is skipped.

    Raises:
        SettingsError: A file differs from its checksum.
    """
    remedy = f"copy it again, or delete {directory} to prepare the corpus again"
    _compare(directory, _listed(directory, remedy), remedy, verbose)


def verify_shards(directory: Path, shards: Collection[Path], verbose: bool = True) -> None:
    """Do the same for ready-made token shards, if their checksums lie beside them.

    Args:
        directory: The folder of the shards.
        shards: The shards to read; others may be missing.
        verbose: Whether to print what takes long or is skipped.

    Raises:
        SettingsError: One of them differs from its checksum.
    """
    remedy = "download it again, or copy it again from where it is whole"
    listed = _listed(directory, remedy)
    unlisted = [shard.name for shard in shards if shard not in listed]
    if verbose and listed and unlisted:
        names, it_is = unlisted[0], "it is"
        if len(unlisted) > 1:
            names, it_is = f"{names} and {len(unlisted) - 1} more", "they are"
        print(f"{directory / checksums.FILE_NAME} does not list {names}, so {it_is} not checked", flush=True)
    _compare(directory, {shard: listed[shard] for shard in shards if shard in listed}, remedy, verbose)


def _listed(directory: Path, remedy: str) -> dict[Path, str]:
    if not (directory / checksums.FILE_NAME).is_file():  # such as a corpus prepared by an earlier version
        return {}
    try:
        return {directory / name: digest for name, digest in checksums.read(directory).items()}
    except ValueError as error:
        raise SettingsError(f"{directory}: {error}; {remedy}") from error


def _compare(directory: Path, files: Mapping[Path, str], remedy: str, verbose: bool) -> None:
    hashes = FileHashes(directory.parent)
    new = [file for file in files if not (file.is_file() and hashes.remembers(file))]
    if new and not os.access(directory.parent, os.W_OK):
        if verbose:
            check = f"cd {in_shell(directory)} && sha256sum -c {checksums.FILE_NAME}"
            print(f"{directory} is not checked, as nothing can be written beside it; to check it by hand: {check}")
        return
    size = sum(file.stat().st_size for file in new if file.is_file())
    if verbose and size > _LARGE_BYTES:
        print(f"Checking {size / 1e9:.1f} GB of {directory} against their checksums (first use only)", flush=True)
    for file, digest in files.items():
        if hashes.hash(file) != digest:
            raise SettingsError(f"{file} differs from its checksum in {checksums.FILE_NAME}; {remedy}")
    hashes.save()
