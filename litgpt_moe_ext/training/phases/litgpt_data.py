"""Checks of LitGPT's own data modules over files, which would open them only after the model is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.errors import refuse_first
from litgpt_moe_ext.wording import counted, quoted

if TYPE_CHECKING:
    from litgpt.data import DataModule, LitData, TextFiles, TinyLlama

# Where litdata looks beyond the file system, or in another place of it.
_ELSEWHERE = ("local:", "/teamspace/")


def check_litgpt_data(data: DataModule) -> None:
    """Raise SettingsError if one of LitGPT's data modules names files that are not there; reads none of them."""
    if not type(data).__module__.startswith("litgpt.data."):
        return  # a subclass may read other files
    from litgpt.data import LitData, TextFiles, TinyLlama

    if not isinstance(data, LitData | TextFiles | TinyLlama):
        return
    if data.num_workers < 0:
        refuse_first([f"data.num_workers: {data.num_workers} must be at least 0"])
    refuse_first(_without_text(data) if isinstance(data, TextFiles) else _without_chunks(data))


def _without_chunks(data: LitData | TinyLlama) -> Iterator[str]:
    splits = getattr(data, "split_names", None) or ("",)
    for folder in getattr(data, "required_paths", None) or [os.path.join(data.data_path, split) for split in splits]:
        if "://" in folder or folder.startswith(_ELSEWHERE) or os.path.isfile(os.path.join(folder, "index.json")):
            continue
        lacks = "has no index.json of litdata" if os.path.isdir(folder) else "does not exist"
        yield (
            f"data.data_path: {quoted(data.data_path)} is not what {type(data).__name__} reads: {quoted(folder)} "
            f"{lacks}; name the folder that litdata's optimize has written, or around those of its splits"
        )


def _without_text(data: TextFiles) -> Iterator[str]:
    own = data.val_data_path is not None
    needed = {"train_data_path": 1 if own else 2, **({"val_data_path": 1} if own else {})}
    for name, least in needed.items():
        folder = Path(getattr(data, name))
        if (found := len(list(folder.glob("*.txt")))) < least:
            first = "" if own else ", of which the first validates where val_data_path is null"
            yield f"data.{name}: {quoted(folder)} has {counted(found, '.txt file')}; it needs {least} or more{first}"
