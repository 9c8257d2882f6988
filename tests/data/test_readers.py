import gzip
import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litgpt_moe_ext.data.reading import record as reading
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.errors import SettingsError

STORIES = ["Once upon a time.", "", "Zwölf Bären ✓\nsecond line"]


def lines(field="text") -> bytes:
    return b"\n".join(json.dumps({"id": i, field: text}).encode() for i, text in enumerate(STORIES)) + b"\n"


def as_list(field="text") -> bytes:
    return b"\n" + json.dumps([{field: text} for text in STORIES], ensure_ascii=False).encode()


def parquet(column) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(column))), "text": column}), sink)
    return sink.getvalue()


def tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content)
    return list(documents(path, TextFormat(**options)))


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.jsonl", lines(), {}),
        ("a.json", lines(), {}),
        ("a.json", as_list(), {}),
        ("file-000000000001.json.gz", gzip.compress(lines("content")), {"field": "content"}),
        ("a.json.gz", gzip.compress(as_list()), {}),
        ("a.parquet", parquet(STORIES), {}),
        ("a.parquet", parquet(pa.array(STORIES, pa.large_string())), {}),
        ("a.parquet", parquet(pa.array(STORIES, pa.string_view())), {}),
        ("a.parquet", parquet(pa.array(STORIES).dictionary_encode()), {}),
        ("a.parquet", parquet(["Once upon a time.", None, STORIES[2]]), {}),
        ("all.tar.gz", tar({"./data00.json": as_list("story"), "./._data00.json": b"x"}), {"field": "story"}),
        ("a.txt", "Once upon a time.\n<|end|><|end|>\nZwölf Bären ✓\nsecond line".encode(), {"separator": "<|end|>"}),
        ("a.txt.gz", gzip.compress("<|".join(STORIES).encode()), {"separator": "<|"}),
    ],
)
def test_every_format(tmp_path, name, content, options):
    found = read(tmp_path, name, content, **options)
    assert [record.text for record in found] == STORIES
    assert len({record.place for record in found}) == 3
    assert found[-1].position == len(content)


def test_a_text_file_is_one_document(tmp_path):
    text = " spaces stay \n"
    (record,) = read(tmp_path, "a.md", text.encode())
    assert (record.text, record.place) == (text, "byte 0")


def test_archive_members_in_order(tmp_path):
    content = tar({"a/data00.json": as_list(), "a/data01.json": lines(), "a/B.TXT.GZ": gzip.compress(b"Loud.")})
    found = read(tmp_path, "a.tar.gz", content)
    assert [record.text for record in found] == [*STORIES * 2, "Loud."]
    assert found[1].place == "item 1 of a/data00.json"
    assert found[4].place.startswith("byte ")
    assert [record.member for record in found[2:4]] == ["data00.json", "data01.json"]


@given(st.lists(st.text("ab<|e>ä", max_size=8), max_size=8), st.integers(1, 7))
def test_separators_at_any_border(tmp_path_factory, texts, chunk):
    path = tmp_path_factory.mktemp("separated") / "a.txt"
    content = "<|e|>".join(texts)
    path.write_text(content, encoding="utf-8")
    reading.CHUNK_BYTES, before = chunk, reading.CHUNK_BYTES
    try:
        found = list(documents(path, TextFormat(separator="<|e|>")))
    finally:
        reading.CHUNK_BYTES = before
    expected = [part.strip() for part in content.split("<|e|>")]
    assert [record.text for record in found] == (expected if expected[-1] or not content else expected[:-1])
    for record in found:
        offset = int(record.place.removeprefix("byte "))
        assert content.encode()[offset:].decode().lstrip().startswith(record.text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json.gz",
            gzip.compress(os.urandom(9000).hex().encode())[:-4000],
            "is damaged or truncated: .* .after byte",
        ),
        ("a.json.gz", b"no gzip at all", "is damaged or truncated: Not a gzipped file"),
        ("a.tar.gz", tar({"a.json": as_list()})[:60], "is damaged or truncated"),
        ("a.parquet", parquet(STORIES)[:-9], "is a damaged parquet file"),
        ("a.parquet", b"nothing", "is a damaged parquet file"),
        ("a.jsonl", lines() + b'{"text": "x"', "is not valid JSON at byte 1.."),
        ("a.jsonl", b'{"text": "\xc3\xa4"} x\n', "is not valid JSON at byte 15: Extra data"),
        ("a.jsonl", lines() + b'{"id": ' + b"9" * 5000 + b"}", "cannot be read at byte 1.. .Exceeds the limit"),
        ("a.json", b"[1]", "has int at item 0 where an object"),
        ("a.jsonl", lines() + b'{"body": "x"}\n', r"has no field 'text' at byte 1.., only \['body'\]; set"),
        ("a.jsonl", b'{"text": 5}\n', "has int in field 'text' at byte 0 where text belongs"),
        ("a.parquet", parquet([1, 2]), "has int64 in column 'text' where text belongs"),
        ("a.txt", b"good \xff", r"is not UTF-8 at byte 5 .invalid start byte.. .* set invalid_utf8 to replace"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a\\ud83d"}', "has half a surrogate pair at byte 0, character 1 of the text"),
        ("a.parquet", parquet(pa.array([b"ok", b"\xff"]).view(pa.string())), "row 1 is not UTF-8 at byte 0"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, name, content)
    assert str(tmp_path / name) in str(error.value)


def test_a_column_that_is_called_as_a_part_of_another(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [{"b": "not this"}], "a.b": ["this"]}), sink)
    assert [record.text for record in read(tmp_path, "a.parquet", sink.getvalue(), field="a.b")] == ["this"]


def test_wrong_column(tmp_path):
    with pytest.raises(ValueError, match=r"a.parquet has no column 'content', only \['id', 'text'\]"):
        read(tmp_path, "a.parquet", parquet(STORIES), field="content")


def test_documents_before_the_damage_are_read(tmp_path):
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(50_000)))
    path = tmp_path / "a.json.gz"
    path.write_bytes(content[: len(content) // 2])
    found = []
    with pytest.raises(ValueError, match="truncated"):  # noqa: PT012
        for record in documents(path, TextFormat()):
            found.append(record.text)
    assert len(found) > 10_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"x\xffy", "x\ufffdy"),
        ("a.jsonl", b'{"text": "x\xffy"}', "x\ufffdy"),
        ("a.jsonl", b'{"text": "x\\ud83dy"}', "x\ufffdy"),
        ("a.csv", b"text\nx\xffy\n", "x\ufffdy"),
        ("a.parquet", parquet(pa.array([b"x\xffy"]).view(pa.string())), "x\ufffdy"),
        ("a.parquet", parquet(pa.array([None, b"x\xffy"]).view(pa.string())), "x\ufffdy"),
    ],
)
def test_invalid_utf8_may_be_replaced(tmp_path, name, content, expected):
    texts = [record.text for record in read(tmp_path, name, content, invalid_utf8="replace")]
    assert list(filter(None, texts)) == [expected]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_unreadable_files(tmp_path, name):
    with pytest.raises(SettingsError, match=name):
        list(documents(tmp_path / name, TextFormat()))
    (tmp_path / name).mkdir()
    with pytest.raises(SettingsError, match=name):
        list(documents(tmp_path / name, TextFormat()))


def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines())
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # to whom permissions mean nothing
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(SettingsError, match="a.jsonl"):
            list(documents(path, TextFormat()))
    finally:
        if root:
            os.seteuid(0)
