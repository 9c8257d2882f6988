"""Finds the files that a setting names: a single file, or those in a folder that match a glob."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from litgpt_moe_ext.data.pipeline.store.finished import MANIFEST, TOKENIZER_DIR
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted

_KINDS = 5  # most kinds to name in a message about other files
_OTHER_FILES = "read other files with TextCorpus, its pattern and field"


def find_files(setting: str, path: Path, pattern: str, otherwise: str = _OTHER_FILES) -> list[Path]:
    """Return the files that a setting names: `path` itself, or those below the folder that match a glob, sorted.

    Hidden files, files in hidden folders, and files in prepared corpora are left out.

    Args:
        setting: Name of the setting.
        path: Its value.
        pattern: The glob.
        otherwise: Another remedy for a folder without such files than changing the setting.

    Raises:
        SettingsError: `path` does not exist, no file matches, or a link leads outside the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        address = re.match(r"[a-z0-9]+:/", str(path))  # of which `Path` has made two slashes one
        download = "it is an address, so download what is there, and " if address else ""
        raise SettingsError(f"{setting}: {quoted(path)} does not exist; {download}set {setting} to a file or a folder")
    found = [file for file in sorted(matches("pattern", path, pattern)) if file.is_file()]
    _refuse_links_out(setting, path, found)
    # The cache may be inside the folder of the documents, but its corpora are not documents.
    found = [file for file in found if not _is_hidden(file, path)]
    prepared = _prepared(path, verbose="**" in pattern)
    found = [file for file in found if prepared.isdisjoint(file.parents)]
    if not found:
        raise SettingsError(
            f"{setting}: {quoted(path)} has no files like {pattern!r}, it has {_names(path)}; set {setting} to another "
            f"folder, or {otherwise}"
        )
    return found


def matches(setting: str, folder: Path, pattern: str) -> list[Path]:
    """Return the files and folders in a folder that match the glob of a setting.

    Raises:
        SettingsError: It is not a glob, or refers outside the folder.
    """
    try:
        return list(folder.glob(pattern))
    except (NotImplementedError, ValueError) as error:  # an absolute or an empty pattern
        raise SettingsError(
            f"{setting}: {pattern!r} must be a glob below {quoted(folder)}, such as '**/*.txt' ({error})"
        ) from error


def say_others(path: Path, pattern: str) -> None:
    """Print which kinds of files in a folder the default pattern leaves out, as the user did not choose it."""
    if not path.is_dir():
        return
    files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
    prepared, matching = _prepared(path, verbose=False), set(path.glob(pattern))
    left_out = (file for file in files if file not in matching and prepared.isdisjoint(file.parents))
    others = Counter(file.suffix or file.name for file in left_out)
    if others:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in others.most_common(_KINDS))
        print(f"Skipped in {path}, as they do not match {pattern}: {kinds}; set pattern to include them", flush=True)


def say_left_out(error: OSError) -> None:
    """Print which folder cannot be read; `os.walk` would skip it silently."""
    print(f"Skipped {error.filename}, which cannot be read ({error.strerror})", flush=True)


def _prepared(path: Path, verbose: bool) -> set[Path]:
    # The prepared corpora below a folder; if verbose, prints which folders a recursive search cannot enter.
    found, root = set(), _root(path)
    for parent, folders, files in os.walk(path, onerror=say_left_out if verbose else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if MANIFEST in files and TOKENIZER_DIR in folders:
            found.add(Path(parent))
        for link in (Path(parent, name) for name in folders if verbose):
            if link.is_symlink() and not (target := link.resolve()).is_relative_to(root):
                print(
                    f"Skipped {link}, a link to {target}, outside of the folder; copy what is there into the folder, "
                    "or give both to a Mixture",
                    flush=True,
                )
    return found


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _refuse_links_out(setting: str, folder: Path, files: Iterable[Path]) -> None:
    """Raise SettingsError if a link leads outside the folder, or outside the hub's cache of a repository."""
    root = _root(folder)
    above = {parent: parent.resolve() for parent in {file.parent for file in files}}
    for file in files:
        target = file.resolve() if file.is_symlink() else above[file.parent] / file.name
        if not target.is_relative_to(root):
            raise SettingsError(
                f"{setting}: {file} is a link to {target}, outside of the folder; copy the file into the "
                "folder, or remove the link"
            )


def _root(folder: Path) -> Path:
    root = folder.resolve()
    # The hub's cache keeps content beside snapshots: repository/blobs, repository/snapshots/commit.
    return next((parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"), root)


def _names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
