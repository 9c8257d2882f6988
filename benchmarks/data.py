"""Preparing and reading tokens, compared with litdata: `uv run python benchmarks/data.py`.

Preparation: the standard library's source, as one JSON lines file per part, encoded with the same tokenizer; the median
of three turns, by one process with a thread per core, and by a process per core, whose start is part of it. Reading:
shuffled batches of the same tokens, without worker processes on either side, the ways taking turns in one process.
litdata's time contains the start of its processes, which it pays on every call.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

from litgpt_moe_ext.data.corpora.python_stdlib import PythonStdlib
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.preparation import prepare_corpus
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.pipeline.sources import file_sources
from litgpt_moe_ext.data.pipeline.store.finished import open_corpus
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.files import read_tokenizer
from litgpt_moe_ext.data.tokenizer.opening import open_for_documents
from litgpt_moe_ext.machine import count_cores

VOCAB_SIZE = 4096
PARTS = 4


def write_parts(folder: Path, megabytes: float) -> list[Path]:
    """Write about this much text as JSON lines, divided among `PARTS` files."""
    left, texts = megabytes * 1e6, []
    for source in PythonStdlib().sources(FileHashes(folder)):
        texts += [record.text for record in source.records()]
        left -= len(texts[-1])
        if left < 0:
            break
    paths = [folder / f"{part}.jsonl" for part in range(PARTS)]
    for part, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[part::PARTS]), encoding="utf-8")
    return paths


def encode_for_litdata(path: str, tokenizer_dir: str):
    """Yield the tokens of each document, as an input of `litdata.optimize`."""
    import torch

    tokenizer = open_for_documents(tokenizer_dir)
    for record in documents(Path(path), TextFormat()):
        yield torch.tensor([*tokenizer.encode(record.text, add_special_tokens=False).ids, 0], dtype=torch.int)


def prepare_with_litdata(paths: list[Path], folder: Path, tokenizer_dir: Path, workers: int) -> None:
    """Prepare the same documents with litdata, in its own folders."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder / "cache")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(folder / "data_cache")
    from litdata import optimize
    from litdata.streaming import TokensLoader

    optimize(
        fn=partial(encode_for_litdata, tokenizer_dir=str(tokenizer_dir)),
        inputs=[str(path) for path in paths],
        output_dir=str(folder / "chunks"),
        num_workers=workers,
        chunk_bytes="50MB",
        item_loader=TokensLoader(),
        reorder_files=False,
    )


def batches_per_second(loader, seconds: float) -> float:
    """Return the batches per second of an iteration over consecutive epochs."""
    count, started = 0, time.perf_counter()
    while True:
        for _ in loader:
            count += 1
            elapsed = time.perf_counter() - started
            if elapsed > seconds:
                return count / elapsed


def loaders(ours: Path, theirs: Path, block_size: int, batch_size: int) -> dict:
    """Return both training loaders over the same tokens."""
    from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader

    from litgpt_moe_ext.data import PreparedCorpus

    corpus = PreparedCorpus(ours)
    corpus.connect(batch_size=batch_size, max_seq_length=block_size)
    corpus.setup()
    dataset = StreamingDataset(str(theirs), item_loader=TokensLoader(block_size=block_size + 1), shuffle=True)
    return {
        "ours": corpus.train_dataloader(),
        "litdata": StreamingDataLoader(dataset, batch_size=batch_size, num_workers=0, drop_last=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=10.0, help="text to prepare, at most the library's 10")
    parser.add_argument("--seconds", type=float, default=2.0, help="per reading measurement")
    options = parser.parse_args()
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_parts(folder, options.megabytes)
        size = sum(path.stat().st_size for path in paths)
        texts = [record.text for path in paths for record in documents(path, TextFormat())]
        train_bpe(texts, BPESettings(VOCAB_SIZE), folder / "tokenizer")
        settings = CorpusSettings(read_tokenizer(folder / "tokenizer"), val_fraction=0.05)
        sources = file_sources(paths, None, TextFormat(), FileHashes(folder))
        times: dict[int, list[float]] = {workers: [] for workers in sorted({1, count_cores()})}
        for turn in range(3):
            for workers in times:
                started = time.perf_counter()
                ours = prepare_corpus(folder / f"{workers}_{turn}", sources, settings, workers, verbose=False)
                times[workers].append(time.perf_counter() - started)
        speeds = {
            f"ours, {workers} process(es)": size / 1e6 / statistics.median(taken) for workers, taken in times.items()
        }
        started = time.perf_counter()
        prepare_with_litdata(paths, folder, folder / "tokenizer", count_cores())
        speeds[f"litdata, {count_cores()} process(es)"] = size / 1e6 / (time.perf_counter() - started)
        slowest = list(speeds.values())[-1]
        rows += [(f"prepare, {way}", f"{speed:.2f} MB/s", f"{speed / slowest:.1f}") for way, speed in speeds.items()]

        for block_size, batch_size in ((256, 8), (2048, 8)):
            both = loaders(ours, folder / "chunks", block_size, batch_size)
            rates: dict[str, list[float]] = {way: [] for way in both}
            for _ in range(3):
                for way, loader in both.items():
                    rate = batches_per_second(loader, options.seconds)
                    rates[way].append(rate * batch_size * block_size)
            medians = {way: statistics.median(values) for way, values in rates.items()}
            rows += [
                (f"read, {way}, length {block_size}", f"{rate / 1e6:.1f}M tok/s", f"{rate / medians['litdata']:.1f}")
                for way, rate in medians.items()
            ]
        tokens = sum(map(len, open_corpus(ours)[0]))
    print(f"\n{size / 1e6:.1f} MB, {tokens:,} tokens, vocabulary {VOCAB_SIZE}, {count_cores()} cores\n")
    print("| what | speed | times litdata |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
