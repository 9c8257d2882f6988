"""Datasets that the `datasets` library finds on the Hugging Face hub or elsewhere: cached, or as files to stream."""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import Side, Source, dataset_source, file_sources, remote_sources
from litgpt_moe_ext.data.reading.compression import COMPRESSIONS
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.reading.remote import is_url, name_of
from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.wording import quoted

_JSON = tuple(f"{form}{suffix}" for form in (".json", ".jsonl", ".ndjson") for suffix in ("", *COMPRESSIONS))
_STREAMED = (".parquet", *_JSON)
_OFFLINE_REMEDY = (
    "without a network, load it once where there is one and copy the cache (HF_HOME), or set dataset to a local folder"
)


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset.

    Attributes:
        dataset: Name on the hub, a local folder, or a format together with `data_files`.
        split: The split, or, without streaming, a slice of it such as `train[:1%]`.
        side: Side of its documents; None decides for each document.
        arguments: Further arguments of `datasets.load_dataset`.
        trained: The dataset's training split, if this one is for validation.
    """

    dataset: str
    split: str
    side: Side | None
    arguments: dict[str, Any] = field(default_factory=dict)
    trained: str | None = None

    def sources(self, text_format: TextFormat, hashes: FileHashes, streaming: bool) -> list[Source]:
        """Return the sources of the split.

        With `streaming`, the `datasets` library only finds the files. Our own readers read them several times faster
        than its streaming, with progress in bytes, and file by file, so that a preparation can continue. Otherwise the
        library downloads the split into its cache, or finds it there.

        Args:
            text_format: How to find the documents, including the column.
            hashes: Hashes of files that are local.
            streaming: Whether to read over the network while encoding.

        Raises:
            SettingsError: The dataset cannot be found or loaded, has no such split or column, or cannot be streamed; or
                the same rows would train and validate.
        """
        return self._streamed(text_format, hashes) if streaming else [self._cached(text_format)]

    def _cached(self, text_format: TextFormat) -> Source:
        import datasets

        try:
            rows: Any = datasets.load_dataset(self.dataset, split=self.split, **self.arguments)
        except Exception as error:  # the library's errors have many bases
            raise SettingsError(
                f"dataset: {self.dataset!r} cannot be loaded with {_told(self.arguments, split=self.split)} ({error}); "
                f"{_OFFLINE_REMEDY}"
            ) from error
        if self.trained is not None and rows.info.splits:
            lengths = {name: info.num_examples for name, info in rows.info.splits.items()}
            if (common := _common_rows(self.trained, self.split, lengths)) is not None:
                name, first, end = common
                where = f", {first:,} to {end - 1:,} of {lengths[name]:,} in {name}"
                raise SettingsError(_would_train_and_validate(self.trained, self.split, where))
        return dataset_source(rows, f"{self.dataset}:{self.split}", self.side, text_format)

    def _streamed(self, text_format: TextFormat, hashes: FileHashes) -> list[Source]:
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.dataset, **self.arguments)
        except Exception as error:
            raise SettingsError(
                f"dataset: {self.dataset!r} cannot be found with {_told(self.arguments)} ({error}); {_OFFLINE_REMEDY}, "
                "or set streaming to false to use the cache"
            ) from error
        splits = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
        if self.split not in splits:
            raise SettingsError(
                f"dataset: {self.dataset!r} has no files for split {self.split!r}, only for {sorted(splits)}; name one "
                "of them (streaming knows no slices), or set streaming to false"
            )
        files = splits[self.split]
        for file in files:
            name = (name_of(file) if is_url(file) else Path(file).name).lower()
            if not name.endswith(_STREAMED):
                raise SettingsError(
                    f"streaming: {file} cannot be streamed, only {', '.join(_STREAMED)}; set streaming to false, so "
                    "that the datasets library reads it"
                )
        if any(is_url(file) for file in files):
            return remote_sources(files, self.side, text_format)
        return file_sources([Path(file) for file in files], self.side, text_format, hashes)


def refuse_streaming(streaming: bool, source_path: Path) -> None:
    """Raise SettingsError if local files are to be streamed."""
    if streaming:
        raise SettingsError(
            f"streaming: true has no effect on the files in source_path {quoted(source_path)}; leave out one of the two"
        )


def check_slices(trained: str, validated: str) -> None:
    """Check the slices of a dataset before it is downloaded, as far as that is possible without its numbers of rows.

    Raises:
        SettingsError: They cannot be read, or have rows in common, be there just the rows that they name (at least a
            hundred) or a billion.
    """
    # No rows of a shorter split are at the places that the slices name.
    named = [int(rows) for rows in re.findall(r"[\[:]-?([\d_]+)(?=[:\]])", f"{trained}+{validated}")]
    names = {part.partition("[")[0].strip() for part in f"{trained}+{validated}".split("+")} - {"all"} or {"all"}
    few, many = (dict.fromkeys(names, length) for length in (max([10**2, *named]), 10**9))
    for name, split in (("train_split", trained), ("val_split", validated)):
        try:
            _instruction(split, few).to_absolute(few)
        except ValueError as error:
            raise SettingsError(
                f"data.{name}: {split!r} must be a split, or rows of it such as train[:99%] ({one_line(error)})"
            ) from error
    # The ends of a slice are linear in the number of rows: what is common at both numbers is so at all between them.
    if all(_common_rows(trained, validated, lengths) for lengths in (few, many)):
        raise SettingsError(_would_train_and_validate(trained, validated))


def _common_rows(trained: str, validated: str, lengths: dict[str, int]) -> tuple[str, int, int] | None:
    """Return the first rows that two slices have in common, as a split, its first row and its end; None without any."""
    ours, theirs = (_instruction(split, lengths).to_absolute(lengths) for split in (trained, validated))
    for train, val in itertools.product(ours, theirs):
        first, end = max(train.from_, val.from_), min(train.to, val.to)
        if train.splitname == val.splitname and first < end:
            return val.splitname, first, end
    return None


def _instruction(split: str, lengths: dict[str, int]) -> Any:
    from datasets import ReadInstruction

    return ReadInstruction.from_spec("+".join(lengths) if split == "all" else split)  # as `load_dataset` reads it


def _would_train_and_validate(trained: str, validated: str, where: str = "") -> str:
    return (
        f"data.val_split: {validated!r} has rows of train_split {trained!r}{where}, which would train and validate; "
        "name rows of their own, such as train[:99%] and train[99%:]"
    )


def _told(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for name, value in {**arguments, **more}.items() if value is not None}
