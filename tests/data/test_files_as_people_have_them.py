"""Line ends, byte-order marks, tables, compressions, and files that should not be read: right, or refused by name."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litgpt_moe_ext.data.corpora.text_corpus import TextCorpus
from litgpt_moe_ext.data.pipeline.finding import find_files
from litgpt_moe_ext.data.pipeline.shards import open_shard
from litgpt_moe_ext.data.reading import plain_text
from litgpt_moe_ext.data.reading import record as reading
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.errors import SettingsError
from tests.data.test_readers import STORIES, as_list, lines, read, tar


def texts(tmp_path, name, content, **options) -> list[str]:
    return [record.text for record in read(tmp_path, name, content, **options)]


def table(delimiter: str = ",", end: str = "\n") -> bytes:
    rows = [("id", "text"), *((str(number), text) for number, text in enumerate(STORIES))]
    quoted = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return end.join([*quoted, ""]).encode()


# ---- line ends and byte-order marks


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n", "<|e|>\n"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_separators_match_line_ends_of_any_style(tmp_path, monkeypatch, end, separator, chunk):
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    written = ["one\nline", "two", "three\n\nlines" if "\n\n" not in separator.replace("\r", "") else "three"]
    content = separator.replace("\r", "").join(written).replace("\n", end)
    found = read(tmp_path, "a.txt", content.encode(), separator=separator)
    assert [record.text for record in found] == written
    for record in found:
        offset = int(record.place.removeprefix("byte "))
        assert content[offset:].replace("\r\n", "\n").replace("\r", "\n").startswith(record.text)


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_a_whole_file_become_lf(tmp_path, end):
    assert texts(tmp_path, "a.txt", f" a{end}{end}b{end}".encode()) == [" a\n\nb\n"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "<|>".join(STORIES).encode()),
        ("a.jsonl", lines()),
        ("a.json", as_list()),
        ("a.csv", table()),
        ("a.csv.gz", gzip.compress(b"\xef\xbb\xbf" + table())),
        ("a.tar.gz", tar({"a.jsonl": b"\xef\xbb\xbf" + lines()})),
    ],
)
def test_a_byte_order_mark_is_not_text(tmp_path, name, content):
    content = content if name.endswith("gz") else b"\xef\xbb\xbf" + content
    assert texts(tmp_path, name, content, separator="<|>") == STORIES


def test_places_count_the_byte_order_mark(tmp_path):
    found = read(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert [record.place for record in found] == ["byte 3", "byte 17"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfone<|>\n\xef\xbb\xbftwo"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n'),
        ("a.jsonl", b'{"text": "one"}\n\xef\xbb\xbf\n{"text": "two"}\n\xef\xbb\xbf'),
    ],
)
def test_joined_files_with_a_byte_order_mark_each(tmp_path, name, content):
    assert texts(tmp_path, name, content, separator="<|>") == ["one", "two"]


# ---- tables and compressions


def test_line_ends_in_cells_and_empty_lines_of_tables(tmp_path):
    content = b'id,text\r\n1,"one\r\nline"\r\n\r\n2,two\r\n\r\n'
    assert texts(tmp_path, "a.csv", content) == ["one\nline", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv.gz"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_empty_document(tmp_path, name, content):
    content = gzip.compress(content) if name.endswith(".gz") else content
    assert texts(tmp_path, name, content) == texts(tmp_path, name, content, separator="<|>") == [""]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tables_in_an_archive(tmp_path, mode):
    members = {"a.csv": table(), "b.tsv": b"\xef\xbb\xbf" + table("\t"), "c.csv.gz": gzip.compress(table())}
    name = "a.tar.gz" if mode == "w:gz" else "a.tar"
    assert texts(tmp_path, name, tar(members, mode)) == STORIES * 3


@pytest.mark.parametrize("content", [b"\n\r\n", b"text\n"])
def test_an_empty_table_has_no_documents(tmp_path, content):
    assert texts(tmp_path, "a.csv", content) == []


def test_a_table_may_begin_with_empty_lines(tmp_path):
    assert texts(tmp_path, "a.tsv", b"\n\nid\ttext\n1\tone\n") == ["one"]


def test_a_column_without_any_text(tmp_path):
    """As pandas writes it: its type is `null`."""
    pq.write_table(pa.table({"text": [None, None]}), tmp_path / "a.parquet")
    assert [record.text for record in documents(tmp_path / "a.parquet", TextFormat())] == ["", ""]


def test_frames_one_after_the_other(tmp_path):
    """As `cat` and parallel compressors write them."""
    packed = b"".join(zstd_bytes(content, tmp_path / "z") for content in (b"one<|>", b"two"))
    assert texts(tmp_path, "a.txt.zst", packed, separator="<|>") == ["one", "two"]


def test_compressed_members_of_an_archive(tmp_path):
    packed = tar({"a.txt.gz": gzip.compress(b"one"), "b.csv.xz": lzma.compress(b"text\ntwo\n")})
    assert texts(tmp_path, "a.tar.gz", packed) == ["one", "two"]
    with pytest.raises(ValueError, match=r"a.tar.gz: b.parquet is parquet, not UTF-8 text; unpack the archive"):
        read(tmp_path, "a.tar.gz", tar({"b.parquet": b"PAR1\x15\x04"}))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
def test_tables(tmp_path, name, delimiter, end):
    assert texts(tmp_path, name, table(delimiter, end)) == STORIES


def test_a_cell_may_be_long(tmp_path):
    long = "word " * 100_000
    assert texts(tmp_path, "a.csv", f'text\n"{long}"\n'.encode()) == [long]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table().replace(b'"text"', b'"body"'), r"has no column 'text', only \['id', 'body'\]; set field"),
        (b"id,text\n1\n", r"has 1 columns in row 0 .line 2., too few for column 'text'"),
        (b'id,text\n1,"never closed', "is not a valid table at line 2: unexpected end of data"),
        (b"id,text\n1,a\n2,\xff\n", r"is not UTF-8 after line .* set invalid_utf8 to replace"),
    ],
)
def test_damaged_tables(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.csv", content)


def zstd_bytes(content: bytes, path) -> bytes:
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_has_a_beginning_at_least(tmp_path, suffix):
    """A file without a byte is a download that failed."""
    for name, content in ((f"a.jsonl{suffix}", b""), ("a.tar", tar({f"a.txt{suffix}": b""}, "w:"))):
        with pytest.raises(ValueError, match=f"{name} is damaged or truncated: "):
            read(tmp_path, name, content)


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.tar"])
def test_compressions(tmp_path, name, suffix):
    content = {"a.jsonl": lines(), "a.txt": "<|>".join(STORIES).encode(), "a.csv": table()}.get(name)
    content = gzip.decompress(tar({"a.jsonl": lines()})) if content is None else content
    compress = {".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix)
    packed = zstd_bytes(content, tmp_path / "z") if compress is None else compress(content)
    found = read(tmp_path, name + suffix, packed, separator="<|>")
    assert [record.text for record in found] == STORIES
    assert found[-1].position == len(packed)
    with pytest.raises(ValueError, match=rf"{name}{suffix} is damaged or truncated: .* .after byte \d+ of \d+"):
        read(tmp_path, name + suffix, packed[: len(packed) * 2 // 3], separator="<|>")


# ---- what is not text, and what should not be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"text"), "is gzip, not UTF-8 text; let its name end in .gz"),
        (bz2.compress(b"text"), "is bzip2, not UTF-8 text; let its name end in .bz2"),
        (lzma.compress(b"text"), "is xz, not UTF-8 text; let its name end in .xz"),
        (b"PK\x03\x04\x00", "is a zip archive, not UTF-8 text; unpack it"),
        (b"%PDF-1.7 ...", "is PDF, not UTF-8 text; extract its text"),
        (
            "text".encode("utf-32"),
            "is UTF-32, not UTF-8 text; convert it to UTF-8, for example with iconv -f UTF-32",
        ),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8 text; convert it to UTF-8, for example with iconv"),
        (b"\x7fELF\x02\x01\x01\x00", "is not text: byte 7 is zero"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("invalid_utf8", ["error", "replace"])
def test_what_is_not_text_is_refused(tmp_path, name, content, message, invalid_utf8):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content, invalid_utf8=invalid_utf8)


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [("a.txt", b"", "byte 9000 is zero"), ("a.csv", b"text\n", r"a character of row 0 .line 2. is zero")],
)
@pytest.mark.parametrize("separator", [None, "<|>"])
def test_what_is_not_text_far_from_the_beginning(tmp_path, name, start, message, separator):
    with pytest.raises(ValueError, match=f"is not text: {message}"):
        read(tmp_path, name, start + b"a" * 9000 + b"\x00", separator=separator)


@pytest.mark.parametrize("text", ["PAR1 may refer to a receptor", "BZhang wrote this", "BZh9", "PAR1"])
@pytest.mark.parametrize("separator", [None, "<|>"])
def test_text_that_begins_like_a_file_of_another_kind(tmp_path, text, separator):
    assert texts(tmp_path, "a.txt", text.encode(), separator=separator) == [text]


def test_an_empty_separator_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="data.separator: '' must have a character; leave it out"):
        TextCorpus(data_path=tmp_path, source_path=tmp_path, separator="")


def test_json_nested_too_deep(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl cannot be read at byte 14"):
        read(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_archive_cut_at_a_members_end(tmp_path, suffix):
    whole = tar({"a.jsonl": lines(), "b.jsonl": lines()}, "w")
    cut = whole[: whole.index(b"b.jsonl")]
    compress = gzip.compress if suffix else bytes
    assert texts(tmp_path, f"a.tar{suffix}", compress(whole)) == STORIES * 2
    with pytest.raises(ValueError, match="is damaged or truncated: the archive has no end mark"):
        read(tmp_path, f"a.tar{suffix}", compress(cut))


def test_a_file_made_to_fill_the_memory(tmp_path, monkeypatch):
    from litgpt_moe_ext.data.reading import compression

    monkeypatch.setattr(compression, "_FREE_BYTES", 1_000_000)
    content = gzip.compress(b"a" * 5_000_000)
    message = r"max_expansion: 200 times their size may come out .*a.txt.gz gave \d+ bytes for \d+; if .*, raise"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.txt.gz", content)
    assert texts(tmp_path, "a.txt.gz", content, max_expansion=2000.0) == ["a" * 5_000_000]
    assert texts(tmp_path, "b.txt.gz", gzip.compress(b"a" * 900_000)) == ["a" * 900_000]


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("not for training")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "inside.txt").symlink_to(folder / "a.txt")
    assert len(find_files("source_path", folder, "**/*.txt")) == 2
    (folder / "outside.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="source_path: .*outside.txt is a link to .*secret.txt, outside of"):
        find_files("source_path", folder, "**/*.txt")


def test_folders_that_are_links_out_of_the_folder(tmp_path, capsys):
    """`**` does not enter them, and another pattern may not."""
    for name in ("elsewhere/a.txt", "corpus/inside/b.txt", "corpus/.hidden/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("text")
    folder = tmp_path / "corpus"
    (folder / "again").symlink_to(folder / "inside")
    (folder / ".hidden" / "link").symlink_to(tmp_path / "elsewhere")
    assert find_files("source_path", folder, "**/*.txt") == [folder / "inside" / "b.txt"]
    assert not capsys.readouterr().out
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert find_files("source_path", folder, "**/*.txt") == [folder / "inside" / "b.txt"]
    assert f"Skipped {folder}/linked, a link to {tmp_path}/elsewhere, outside of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="source_path: .*linked/a.txt is a link to .*elsewhere/a.txt, outside of"):
        find_files("source_path", folder, "*/*.txt")
    (folder / "linked").unlink()
    inside = [folder / name / "b.txt" for name in ("again", "inside")]
    assert find_files("source_path", folder, "*/*.txt") == inside


def test_the_hubs_cache_consists_of_links(tmp_path):
    (tmp_path / "repository" / "blobs").mkdir(parents=True)
    (tmp_path / "repository" / "blobs" / "0123").write_text("text")
    snapshot = tmp_path / "repository" / "snapshots" / "4567"
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").symlink_to("../../blobs/0123")
    assert find_files("source_path", snapshot, "*.txt") == [snapshot / "a.txt"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_an_archive_are_named(tmp_path, mode):
    """One member is read once, whatever names it has, and what is elsewhere cannot be; neither is silent."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        info = tarfile.TarInfo("a/a.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
        for name, kind, target in (("b.txt", tarfile.LNKTYPE, "a/a.txt"), ("a/c.txt", tarfile.SYMTYPE, "/away.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    records = read(tmp_path, "a.tar.gz" if mode == "w:gz" else "a.tar", content.getvalue())
    assert [(record.text, record.place) for record in records] == [
        ("one", "byte 0 of a/a.txt"),
        ("", "the link b.txt to a/a.txt"),
        ("", "the link a/c.txt to /away.txt"),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_damaged_headers_of_numpy_files(tmp_path, seed):
    """Whatever byte is changed, the file is read or refused by name."""
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    content[rng.integers(6, 128)] = rng.integers(256)
    path.write_bytes(content)
    try:
        open_shard(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_a_path_that_leads_up_in_an_archive_writes_nothing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert texts(folder, "a.tar.gz", tar({"../../up.jsonl": lines()})) == STORIES
    assert os.listdir(folder) == ["a.tar.gz"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("name", "content", "options", "place"),
    [
        ("a.txt", b"x" * 3000, {}, 0),
        ("a.txt", b"a<|>" + b"x" * 3000 + b"<|>b", {"separator": "<|>"}, 4),
        ("a.jsonl", lines() + b'{"text": "' + b"x" * 3000 + b'"}', {}, len(lines())),
        ("a.json", b'[{"text": "' + b"x" * 99000 + b'"}]', {}, 0),
        ("a.tar.gz", tar({"a.txt": b"x" * 3000}), {}, 0),
    ],
)
def test_a_document_longer_than_memory_is_refused(tmp_path, monkeypatch, name, content, options, place):
    monkeypatch.setattr(reading, "memory_bytes", lambda: 2000 * reading._ENCODING_BYTES)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 500)
    with pytest.raises(SettingsError, match=rf"has more than \d+ bytes in one piece from byte {place} on, too many to"):
        read(tmp_path, name, content, **options)


def test_a_cell_longer_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "memory_bytes", lambda: 2000 * reading._ENCODING_BYTES)
    with pytest.raises(SettingsError, match="field larger than field limit"):
        read(tmp_path, "a.csv", b"text\n" + b"x" * 3000)


def test_the_largest_document_follows_the_memory():
    assert 1 << 20 < reading.largest_document() < 1 << 36


def test_a_long_document_is_searched_once(tmp_path, monkeypatch):
    """How far from its beginning a document is searched again does not grow with it."""
    searched = []

    class Pattern:
        def finditer(self, text, start=0):
            searched.append(len(text) - start)
            return iter(())

    monkeypatch.setattr(reading, "CHUNK_BYTES", 100)
    monkeypatch.setattr(plain_text.re, "compile", lambda _: Pattern())
    read(tmp_path, "a.txt", b"x" * 5000, separator="<|>")
    assert len(searched) > 50
    assert max(searched) <= 103


def test_many_empty_documents(tmp_path):
    """They cost no memory, and are counted."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n' * 200_000 + lines())
    found = sum(record.text == "" for record in documents(tmp_path / "a.jsonl", TextFormat()))
    assert found == 200_000 + STORIES.count("")


@pytest.mark.parametrize(("separator", "hint"), [("\\n\\n", " (a shell gives the line end"), ("<|end|>", "")])
def test_a_separator_that_divides_nothing_is_said(tmp_path, capsys, separator, hint):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two\n")
    said = f"separator: {separator!r} is within no file, so each is one document{hint}"

    def prepare(path, **settings):
        settings = {"source_path": path, "data_path": tmp_path / "cache", "bpe": BPESettings(270)} | settings
        TextCorpus(**({"val_fraction": 0.5} | settings)).prepare()

    prepare(tmp_path, separator=separator)
    assert said in capsys.readouterr().out
    with pytest.raises(SettingsError, match=r"leaves no .* of 1 document in 1 source, the first .*a.txt; separator: "):
        prepare(tmp_path / "a.txt", separator=separator)
    for settings in ({"separator": "\n\n"}, {"separator": separator, "train_count": 1}, {}):
        prepare(tmp_path, **settings)
        assert "is within no file" not in capsys.readouterr().out


def test_the_same_content_may_not_train_and_validate(tmp_path, capsys):
    for folder, count in (("train", 30), ("val", 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(b"\n".join(b"%s %d" % (folder.encode(), n) for n in range(count)))
    shutil.copy(tmp_path / "train" / "a.txt", tmp_path / "train" / "b.txt")
    settings = {"source_path": tmp_path / "train", "val_path": tmp_path / "val", "data_path": tmp_path / "cache"}
    corpus = TextCorpus(**settings, separator="\n", bpe=BPESettings(270))
    corpus.prepare()
    assert "1 source with the same content as another one, which counts twice" in capsys.readouterr().out
    shutil.copy(tmp_path / "train" / "a.txt", tmp_path / "val" / "c.txt")
    with pytest.raises(
        SettingsError, match=r"val_path: .*val/c.txt has the content of .*train/b.txt, which would train"
    ):
        corpus.prepare()
