"""Random damage by seed: whatever is wrong with a file, it is read or refused by name, and nothing else happens."""

import bz2
import gzip
import io
import json
import lzma
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litgpt_moe_ext.data.pipeline.shards import open_shard, scan_shard, write_shard
from litgpt_moe_ext.data.pipeline.store.finished import read_manifest
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.files import read_tokenizer
from litgpt_moe_ext.data.tokenizer.opening import open_for_documents, special_token
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.hellaswag import load_items
from tests.data.test_readers import tar
from tests.data.test_text_corpus import stories

ROUNDS = int(os.environ.get("MOE_TEST_DAMAGES", "40"))
TEXTS = stories(30)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
LIST = json.dumps([{"text": text} for text in TEXTS]).encode()
TABLE = "\n".join(["id,text", *(f'{number},"{text}"' for number, text in enumerate(TEXTS))]).encode()
QUESTIONS = "".join(
    json.dumps({"ind": n, "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c", "endings": list("wxyz")})[
        :-1
    ]
    + ', "label": 2}\n'
    for n in range(9)
).encode()


def parquet() -> bytes:
    pq.write_table(pa.table({"text": TEXTS}), buffer := io.BytesIO())
    return buffer.getvalue()


def archive(mode: str) -> bytes:
    return tar({f"{number}.jsonl": LINES for number in range(3)}, mode)


def shard(tmp_path, name: str) -> bytes:
    path = tmp_path / name
    tokens = np.arange(200, dtype=np.uint16)
    np.save(path, tokens) if name.endswith(".npy") else write_shard(path, tokens, 300)
    return path.read_bytes()


def read_documents(path):
    return [record.text for record in documents(path, TextFormat(separator="\n\n"))]


def read_shard(path):
    scan_shard(open_shard(path), 1 << 20)


def read_tokenizer_dir(path):
    special_token(read_tokenizer(path.parent), "eos", path.parent)
    open_for_documents(path.parent).encode("once", add_special_tokens=False)


def read_corpus(path):
    read_manifest(path.parent)


CASES = {
    "text.txt": ("\n\n".join(TEXTS).encode(), read_documents),
    "lines.jsonl": (LINES, read_documents),
    "list.json": (LIST, read_documents),
    "table.csv": (TABLE, read_documents),
    "table.tsv": (TABLE.replace(b",", b"\t"), read_documents),
    "lines.jsonl.gz": (gzip.compress(LINES), read_documents),
    "lines.jsonl.bz2": (bz2.compress(LINES), read_documents),
    "lines.jsonl.xz": (lzma.compress(LINES), read_documents),
    "lines.jsonl.zst": (pa.compress(LINES, "zstd", asbytes=True), read_documents),
    "table.parquet": (parquet(), read_documents),
    "archive.tar": (archive("w"), read_documents),
    "archive.tar.gz": (archive("w:gz"), read_documents),
    "shard.bin": (None, read_shard),
    "shard.npy": (None, read_shard),
    "tokenizer.json": (None, read_tokenizer_dir),
    "tokenizer_config.json": (None, read_tokenizer_dir),
    "generation_config.json": (b'{"eos_token_id": [0, 1], "bos_token_id": 0}', read_tokenizer_dir),
    "manifest.json": (json.dumps({"file_sizes": {}, "vocab_size": 300, "eos_id": 0}).encode(), read_corpus),
    "hellaswag.jsonl": (QUESTIONS, load_items),
}


def damage(content: bytes, draw: random.Random) -> bytes:
    """Cut, change, insert, repeat or remove at a random place, more often near the beginning, where headers are."""
    at = draw.randrange(len(content)) if draw.random() < 0.6 else draw.randrange(min(len(content), 200))
    length = draw.choice((1, 1, 2, 8, 100))
    noise = bytes(draw.randrange(256) for _ in range(length))
    kind = draw.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + noise + content[at + length :]
    if kind == 3:
        return content[:at] + noise + content[at:]
    if kind == 4:
        return content[:at] + content[at + length :]
    if kind == 5:
        words = (b"null", b"NaN", b"-1", b'"', b"[[[[", b"{}", b"1e999", b"\x00", b"9" * 30, b'"\\ud800"')
        return content[:at] + draw.choice(words) + content[at + draw.choice((0, 1, 4)) :]
    return content[:at] + content[max(at - 300, 0) : at] + content[at:]


@pytest.mark.parametrize("name", CASES)
def test_random_damage_is_read_or_refused_by_name(tmp_path, name):
    content, read = CASES[name]
    if content is None and name.startswith("shard"):
        content = shard(tmp_path, name)
    elif read is read_tokenizer_dir:
        train_bpe(TEXTS, BPESettings(270), tmp_path)
        if content is not None:
            (tmp_path / "tokenizer_config.json").write_text("{}")
        content = content or (tmp_path / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content)
    read(path)  # the undamaged file is right
    draw, messages = random.Random(name), []
    for _ in range(ROUNDS):
        path.write_bytes(damage(content, draw))
        try:
            read(path)
        except SettingsError as error:
            messages.append(str(error))
    assert messages
    assert [message for message in messages if "\n" in message or str(tmp_path) not in message] == []
