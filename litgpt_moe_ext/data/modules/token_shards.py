"""Ready-made token shards, such as FineWeb-Edu in build-nanogpt's or llm.c's format."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe_ext.data.modules.base import ShardModule, is_first_rank
from litgpt_moe_ext.data.packing import first_tokens
from litgpt_moe_ext.data.pipeline.finding import matches
from litgpt_moe_ext.data.pipeline.shards import open_shard, scan_shard
from litgpt_moe_ext.data.pipeline.store.verification import verify_shards
from litgpt_moe_ext.errors import SettingsError, did_you_mean_inside
from litgpt_moe_ext.field_types import NonNegativeInt, PositiveInt, check_fields
from litgpt_moe_ext.wording import counted, quoted

SUFFIXES = (".bin", ".npy")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation")


@dataclass
class TokenShards(ShardModule):
    """Existing token shards, in any format that `litgpt_moe_ext.data.pipeline.shards.open_shard` reads.

    The shards form one stream in the natural order of their names (2 before 10). Windows run across file borders, so no
    token is lost there. If a `SHA256SUMS` lies beside the shards, they are compared with it, once per location and
    again after a file has changed.
    """

    data_path: Path
    """Folder of the shards."""
    train_pattern: str | None = None
    """Glob of the training files in the folder. Default: files with the word `train` in their names, or else
    all but the validation files."""
    val_pattern: str | None = None
    """Glob of the validation files in the folder. Default: files with the word `val` in their names, or else the
    first file."""
    vocab_size: PositiveInt | None = None
    """Vocabulary size of the shards' tokenizer; every id is checked against it. Default: the model's."""
    train_count: PositiveInt | None = None
    """Number of tokens to train on, from the first: shards do not mark where documents end. Default: all."""
    val_count: PositiveInt | None = None
    """Number of tokens to validate on, from the first. Default: all."""
    shuffle: bool = True
    """Whether to shuffle the windows; otherwise they keep the order of the files."""
    seed: NonNegativeInt = 42
    """Seed of the order of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "data.")
        self._corpus_id = ""

    def require_vocabulary(self, padded_vocab_size: int) -> None:
        """Have `setup` check every id against the model's vocabulary (or the smaller `vocab_size`)."""
        if self.vocab_size is not None and self.vocab_size > padded_vocab_size:
            raise SettingsError(
                f"data.vocab_size: {self.vocab_size} is larger than the model's padded_vocab_size of "
                f"{padded_vocab_size}; set model_config.padded_vocab_size to {self.vocab_size} or more"
            )
        self._model_vocab_size = padded_vocab_size

    def prepare_data(self) -> None:
        """Check that the shards can be read and match their checksums.

        Raises:
            SettingsError: See `check_shards`; or a file differs from its checksum.
        """
        verify_shards(self.data_path, self.check_shards(), is_first_rank())

    def check_shards(self) -> list[Path]:
        """Return all shards; reads only their beginnings.

        Raises:
            SettingsError: A file cannot be read or is not a shard, there are none, or there is none to validate on, or
                there are too few tokens for a window.
        """
        files = self.find_shards()
        for split, shards in zip(("training", "validation"), self._opened(files), strict=True):
            if self.max_seq_length > 0:  # connected
                self.windows(shards, f"{split} data in {quoted(self.data_path)}")
        return [*files[0], *files[1]]

    def _opened(self, files: Iterable[Sequence[Path]]) -> list[list[Any]]:
        """Return the shards of both splits, cut to their counts."""
        shards: list[list[Any]] = [[open_shard(path) for path in paths] for paths in files]
        for i, count in enumerate((self.train_count, self.val_count)):
            if count is not None:
                shards[i] = list(first_tokens(shards[i], count))
        return shards

    def find_shards(self) -> tuple[list[Path], list[Path]]:
        """Return the training and the validation files, in natural order.

        Raises:
            SettingsError: `data_path` is not a folder, there is nothing to train on, nothing to validate
                on, or a file is in both.
        """
        folder = self.data_path
        if not folder.is_dir():
            raise SettingsError(f"data_path: {quoted(folder)} is not a folder; set data_path to a folder of shards")
        shards = _natural_order(path for path in folder.iterdir() if path.suffix in SUFFIXES)
        named = {words[0]: _named(shards, words) for words in (_TRAIN, _VAL)}
        if self.val_pattern is not None:
            val = _natural_order(matches("val_pattern", folder, self.val_pattern))
        else:
            val = named["val"] or shards[: len(shards) > 1]
        if self.train_pattern is not None:
            train = _natural_order(matches("train_pattern", folder, self.train_pattern))
        else:
            train = [path for path in named["train"] or shards if path not in val]
        for split, paths, pattern in (("train", train, self.train_pattern), ("validation", val, self.val_pattern)):
            if not paths:
                setting = "train_pattern" if split == "train" else "val_pattern"
                there = f"{counted(len(shards), 'file')} ending in {' or '.join(SUFFIXES)}"
                if pattern is not None:
                    remedy = f", none like {setting}: {pattern!r}; set it to a glob that names them"
                else:
                    inside = (did_you_mean_inside(folder, f"*{split[:3]}*{suffix}") for suffix in SUFFIXES)
                    remedy = (
                        next(filter(None, inside), None)
                        or "; it needs two or more, of which those with val in their names validate, or else the "
                        f"first. Rename them, or set {setting}"
                    )
                raise SettingsError(f"data_path: {quoted(folder)} has no {split} shards: it has {there}{remedy}")
        if both := set(train) & set(val):
            raise SettingsError(
                f"train_pattern: {self.train_pattern!r} and val_pattern {self.val_pattern!r} both match "
                f"{sorted(both)[0]}, which would train and validate; give patterns that do not overlap"
            )
        return train, val

    def open_shards(self) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """See `ShardModule.open_shards`; checks the ids."""
        files = self.find_shards()
        shards = self._opened(files)
        vocab_size = self.vocab_size or self._model_vocab_size
        found = [[scan_shard(shard, vocab_size) for shard in side] for side in shards]
        digest = hashlib.sha256()
        for shard, fingerprint in zip(shards[0], found[0], strict=True):
            digest.update(f"{Path(str(shard.filename)).name}:{len(shard)}:".encode() + fingerprint)
        self._corpus_id = digest.hexdigest()[:16]
        if is_first_rank():
            checked = "ids not checked: set vocab_size" if vocab_size is None else f"ids below {vocab_size}"
            for split, paths, parts in zip(("train on", "validate on"), files, shards, strict=True):
                names = paths[0].name if len(paths) == 1 else f"{paths[0].name} .. {paths[-1].name}"
                tokens = sum(map(len, parts))
                print(
                    f"To {split}: {counted(len(paths), 'shard')}, {names}, {counted(tokens, 'token')} ({checked})",
                    flush=True,
                )
        return shards[0], shards[1]

    @property
    def corpus_id(self) -> str:
        """A hash of the names, lengths and tokens of the training shards."""
        return self._corpus_id


def _named(shards: Sequence[Path], words: Sequence[str]) -> list[Path]:
    """Return the shards with one of the words in their names: `web_val`, `webVal`, but not `evaluation`.

    If there are none, those with a word that ends in the first one count (`webval`), unless these are all shards
    (`retrieval_1`, `retrieval_2`).
    """
    names = {path: [word.lower() for word in _WORD.findall(path.stem)] for path in shards}
    if found := [path for path, name in names.items() if set(words) & set(name)]:
        return found
    found = [path for path, name in names.items() if any(word.endswith(words[0]) for word in name)]
    return found if len(found) < len(shards) else []


def _natural_order(paths: Iterable[Path]) -> list[Path]:
    def key(path: Path) -> tuple[list, str]:
        parts = [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
        return parts, path.name  # the name orders 1 and 01, which a folder may list either way

    return sorted((path for path in paths if path.is_file()), key=key)
