"""Documents in any script, written into files of any kind that a corpus is read from."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.attack.plain_data import with_line_feeds

ALPHABETS = (
    *("abcdefgh ,.", "aeiou \n", "ÄÖÜßé ", "漢字かな交じり文", "אבגד هوز", "हिन्दी ไทย", "0123456789 -", "{}[]\"'\\,;|"),
    *(
        "😀👩\u200d👩\u200d👧🏽",
        "\u0301\u200b\u200d\ufeff",
        " \t\n",
        "\r\n\r",
        "\x01\x0b\x0c\x1b\x1c\x85\u2028",
        "▁Ġ<0A>",
    ),
)
WORDS = (
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<0x0A>",
    "<pad>",
    "null",
    "PAR1",
    "BZh",
    "text",
    "▁a",
    "\ufeff",
    "the the the",
)
SEPARATORS = ("<|endoftext|>", "\n\n", "\n---\n", "\x1e", "\n")


def random_text(chance: random.Random) -> str:
    """Return a document: of some characters, seldom empty or long."""
    kind = chance.random()
    if kind < 0.06:
        return chance.choice(("", " ", "\n", "\t\r\n", "\u3000"))
    size = chance.choice((1, 3, 20, 20, 60, 60, 300)) if kind < 0.98 else 5000
    alphabets = chance.sample(ALPHABETS, 2)
    parts = []
    while sum(map(len, parts)) < size:
        parts.append(chance.choice(WORDS) if chance.random() < 0.1 else chance.choice(chance.choice(alphabets)))
    return "".join(parts)


def random_documents(chance: random.Random, count: int) -> list[str]:
    """Return so many documents, some of them twice."""
    texts = [random_text(chance) for _ in range(count)]
    return [chance.choice(texts) if chance.random() < 0.05 else text for text in texts]


@dataclass(frozen=True)
class Form:
    """A kind of files.

    Attributes:
        suffix: Of their names.
        write: Returns a file with documents, and the documents that are to be read from it.
        settings: Of a corpus that reads them.
    """

    suffix: str
    write: Callable[[random.Random, list[str]], tuple[bytes, list[str]]]
    settings: dict[str, str]


def _mark(chance: random.Random) -> bytes:
    return chance.choice((b"", b"", b"\xef\xbb\xbf"))


def _whole(chance: random.Random, texts: list[str]) -> tuple[bytes, list[str]]:
    text = "".join(texts).lstrip("\ufeff")
    return _mark(chance) + text.encode(), [with_line_feeds(text)]


def _separated(separator: str) -> Callable[[random.Random, list[str]], tuple[bytes, list[str]]]:
    def write(chance: random.Random, texts: list[str]) -> tuple[bytes, list[str]]:
        # What is white space at the ends of a document is dropped, and may then not be a part of a separator.
        cleaned = (with_line_feeds(text).strip().lstrip("\ufeff").strip() for text in texts)
        kept = [
            text for text in cleaned if separator not in f"{text}{separator}"[:-1] and not text.startswith("\ufeff")
        ]
        end = chance.choice(("\n", "\r\n", "\r"))
        content = "".join(f"{text}{chance.choice(('', ' '))}{separator}" for text in kept).replace("\n", end)
        return _mark(chance) + content.encode(), kept

    return write


def _json_lines(chance: random.Random, texts: list[str]) -> tuple[bytes, list[str]]:
    lines = []
    for text in texts:
        item: dict = {"id": 1, "body": text or chance.choice(("", None)), "text": "another"}
        lines.append(json.dumps(item, ensure_ascii=chance.random() < 0.5).encode())
        lines.extend([b""] * (chance.random() < 0.1))
    end = chance.choice((b"\n", b"\r\n"))
    return _mark(chance) + end.join(lines) + chance.choice((b"", end)), texts


def _json_list(chance: random.Random, texts: list[str]) -> tuple[bytes, list[str]]:
    items = [{"body": text, "n": [1, {"body": "inside"}]} for text in texts]
    return _mark(chance) + json.dumps(items, indent=chance.choice((None, 1)), ensure_ascii=False).encode(), texts


def _table(delimiter: str) -> Callable[[random.Random, list[str]], tuple[bytes, list[str]]]:
    def write(chance: random.Random, texts: list[str]) -> tuple[bytes, list[str]]:
        file = io.StringIO()
        ends = chance.choice(("\n", "\r\n"))
        rows = csv.writer(file, delimiter=delimiter, lineterminator=ends, quoting=chance.choice((1, 2)))
        rows.writerow(["n", "body"])
        for number, text in enumerate(texts):
            rows.writerow([number, text])
            file.write(ends * (chance.random() < 0.1))
        return _mark(chance) + file.getvalue().encode(), [with_line_feeds(text) for text in texts]

    return write


def _parquet(chance: random.Random, texts: list[str]) -> tuple[bytes, list[str]]:
    kind = chance.choice((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())))
    cells = [text or chance.choice(("", None)) for text in texts]
    table = pa.table({"n": list(range(len(texts))), "body": pa.array(cells, pa.string()).cast(kind)})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=chance.choice((1, 7, 1000)), compression=chance.choice(("NONE", "ZSTD")))
    return file.getvalue(), texts


FORMS = (
    Form(".txt", _whole, {}),
    *(Form(".txt", _separated(separator), {"separator": separator}) for separator in SEPARATORS),
    Form(".jsonl", _json_lines, {"field": "body"}),
    Form(".ndjson", _json_lines, {"field": "body"}),
    Form(".json", _json_list, {"field": "body"}),
    Form(".csv", _table(","), {"field": "body"}),
    Form(".tsv", _table("\t"), {"field": "body"}),
    Form(".parquet", _parquet, {"field": "body"}),
)


def _in_frames(compress: Callable[[bytes], bytes]) -> Callable[[random.Random, bytes], bytes]:
    def write(chance: random.Random, content: bytes) -> bytes:
        at = sorted(chance.choices(range(len(content) + 1), k=chance.choice((0, 0, 2))))
        borders = [0, *at, len(content)]
        return b"".join(compress(content[first:end]) for first, end in zip(borders, borders[1:], strict=False))

    return write


COMPRESSIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "": lambda _chance, content: content,
    ".gz": _in_frames(gzip.compress),
    ".bz2": _in_frames(bz2.compress),
    ".xz": _in_frames(lzma.compress),
    ".zst": _in_frames(lambda content: pa.compress(content, "zstd", asbytes=True)),
}


def write_files(chance: random.Random, folder: Path, form: Form, texts: list[str]) -> list[str]:
    """Write documents into some files below a folder, and return what is to be read from them, in order.

    Args:
        chance: What chooses.
        folder: For the files.
        form: Of all of them.
        texts: The documents.
    """
    count = len(texts) if form.write is _whole else chance.choice((1, 2, 5))
    names = sorted(
        {(*(chance.choice(("a", "b c", "ü")) for _ in range(chance.randrange(3))), f"{n:03}") for n in range(count)}
    )
    read: list[str] = []
    archives = form.suffix != ".parquet" and chance.random() < 0.15
    for number, parts in enumerate(names):
        own = texts[number * len(texts) // len(names) : (number + 1) * len(texts) // len(names)]
        suffix = "" if form.suffix == ".parquet" else chance.choice((*COMPRESSIONS, ""))
        content, documents = form.write(chance, own)
        if archives:
            inner = chance.choice(tuple(COMPRESSIONS))
            content = _archive(chance, f"{parts[-1]}{form.suffix}{inner}", COMPRESSIONS[inner](chance, content))
        path = folder.joinpath(*parts[:-1], f"{parts[-1]}{'.tar' if archives else form.suffix}{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(COMPRESSIONS[suffix](chance, content))
        read += documents
    (folder / ".hidden.txt").write_text("hidden")
    return read


def _archive(chance: random.Random, name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    ) as archive:
        for path, data in ((f"folder/._{name}", b"\x00resource"), (f"folder/{name}", content)):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()
