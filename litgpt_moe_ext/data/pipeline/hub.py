"""Data sets of the Hugging Face hub, or what its library finds elsewhere: cached by it, or as files to stream."""

from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.data.pipeline.readers import TextFormat
from litgpt_moe_ext.data.pipeline.remote import is_url, name_of
from litgpt_moe_ext.data.pipeline.sources import FileHashes, Source, dataset_source, file_sources, remote_sources

_STREAMED = (".parquet", *(f"{suffix}{gz}" for suffix in (".json", ".jsonl", ".ndjson") for gz in ("", ".gz")))
_OFFLINE_REMEDY = (
    "Without a network, load it once where there is one and copy the cache (HF_HOME), or set the data set to a local "
    "folder."
)


def cached_source(
    dataset: str, split: str, side: Literal["train", "val"] | None, text_format: TextFormat, **arguments: Any
) -> Source:
    """Returns a split as a source. The ``datasets`` library downloads it into its cache, or finds it there.

    Args:
        dataset: Name on the hub, a local folder, or a format together with `data_files`.
        split: The split, or a slice of it such as ``train[:1%]``.
        side: Which side its documents belong to.
        text_format: The column is in it.
        **arguments: As for `datasets.load_dataset`.

    Raises:
        ValueError: It cannot be loaded, or has no such split or column.
    """
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split=split, **arguments)
    except Exception as error:  # the library's errors have many bases
        raise ValueError(
            f"The data set {dataset!r} cannot be loaded with {_told(arguments, split=split)}: {error}. "
            f"{_OFFLINE_REMEDY}"
        ) from error
    return dataset_source(rows, f"{dataset}:{split}", side, text_format)


def streamed_sources(
    dataset: str,
    split: str,
    side: Literal["train", "val"] | None,
    text_format: TextFormat,
    hashes: FileHashes,
    **arguments: Any,
) -> list[Source]:
    """Returns the files of a split as sources that are read over the network while they are encoded.

    The ``datasets`` library only says which files these are. They are read by our own readers, several times faster
    than by its streaming, with progress in bytes, and file by file, so that a preparation can continue.

    Args:
        dataset: As for `cached_source`.
        split: The split; no slice.
        side: Which side its documents belong to.
        text_format: How to find the documents in the files.
        hashes: Of files that turn out to be local.
        **arguments: As for `datasets.load_dataset_builder`.

    Raises:
        OSError: A file cannot be reached.
        ValueError: The data set cannot be found, has no such split, or consists of files of another kind.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, **arguments)
    except Exception as error:
        raise ValueError(
            f"The data set {dataset!r} cannot be found with {_told(arguments)}: {error}. {_OFFLINE_REMEDY} With "
            "streaming=false the cache is used."
        ) from error
    splits = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    if split not in splits:
        raise ValueError(
            f"The data set {dataset!r} has no files for split {split!r}; there are {sorted(splits)}. Name one of "
            "them (streaming knows no slices), or set streaming to false."
        )
    files = splits[split]
    for file in files:
        name = (name_of(file) if is_url(file) else Path(file).name).lower()
        if not name.endswith(_STREAMED):
            raise ValueError(
                f"{file} cannot be streamed; what can is {', '.join(_STREAMED)}. Set streaming to false, so that the "
                "datasets library reads it."
            )
    if any(is_url(file) for file in files):
        return remote_sources(files, side, text_format)
    return file_sources([Path(file) for file in files], side, text_format, hashes)


def _told(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for name, value in {**arguments, **more}.items() if value is not None}
