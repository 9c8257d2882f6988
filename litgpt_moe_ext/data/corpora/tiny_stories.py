"""TinyStories in all its published forms."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from litgpt_moe_ext.data.corpora.documents import DocumentCorpus
from litgpt_moe_ext.data.pipeline.finding import find_files
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import Side, Source, file_sources, split_sources
from litgpt_moe_ext.data.reading.compression import split_compression
from litgpt_moe_ext.data.reading.record import Record, TextFormat
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted

_FIRST_STORIES = "data00.json"


@dataclass(kw_only=True)
class TinyStories(DocumentCorpus):
    """TinyStories in any published form: parquet, the archive or folder of JSON lists, or two text files.

    | files at `source_path`                               | validation files         |
    | ---------------------------------------------------- | ------------------------ |
    | `train*.parquet`, `validation*.parquet`              | `validation*`            |
    | `TinyStories_all_data.tar.gz`, or its `data*.json`   | the first, `data00.json` |
    | `*train*.txt`, `*valid*.txt` with `<|endoftext|>`    | `*valid*.txt`            |

    Other files are left out.
    """

    source_path: Path
    """Archive, or folder with the files at any depth."""
    data_path: Path = Path("data/tinystories")
    """Cache folder, with a folder of its own for every combination of documents and settings."""
    field: str | None = None  # pyrefly: ignore[bad-override-mutable-attribute] one default per form
    """JSON key or column of the text. Default: `text` in parquet, `story` in JSON."""

    @property
    def text_format(self) -> TextFormat:
        """The part of the format given by settings; the rest follows from the files."""
        return TextFormat(self.field or "", None, self.invalid_utf8, self.max_expansion)

    def sources(self, hashes: FileHashes) -> list[Source]:
        """See `EncodedCorpus.sources`."""
        stories = replace(self.text_format, field=self.field or "story")
        if self.source_path.is_file():
            if not split_compression(self.source_path.name.lower())[0].endswith(".tar"):
                raise SettingsError(
                    f"source_path: {quoted(self.source_path)} must be the archive TinyStories_all_data.tar.gz; name "
                    "the folder of other forms, so that their validation part is found, or use TextCorpus"
                )
            (archive,) = file_sources([self.source_path], None, stories, hashes)
            return [_part_of(archive, "train"), _part_of(archive, "val")]
        found = find_files("source_path", self.source_path, "**/*")
        forms = (
            ("train*.parquet", "validation*.parquet", replace(stories, field=self.field or "text")),
            ("data*.json", _FIRST_STORIES, stories),
            ("*train*.txt", "*valid*.txt", replace(stories, separator="<|endoftext|>")),
        )
        for trains, validates, text_format in forms:
            val = [file for file in found if fnmatchcase(file.name.lower(), validates)]
            train = [file for file in found if fnmatchcase(file.name.lower(), trains) and file not in val]
            if train and val:
                return split_sources(train, val, text_format, hashes)
        raise SettingsError(
            f"source_path: {quoted(self.source_path)} has none of TinyStories' forms with both a training and a "
            f"validation part: train-*.parquet and validation-*.parquet, {_FIRST_STORIES} and others, or *train*.txt "
            f"and *valid*.txt. It has {', '.join(file.name for file in found[:5])}; set source_path to another folder, "
            "or use TextCorpus"
        )


def _part_of(archive: Source, split: Side) -> Source:
    records = partial(_of_members, archive, split == "val")
    return replace(archive, split=split, identity=f"{archive.identity}:{split}", records=records)


def _of_members(archive: Source, validating: bool) -> Iterator[Record]:
    for record in archive.records():
        if (record.member == _FIRST_STORIES) == validating:
            yield record
