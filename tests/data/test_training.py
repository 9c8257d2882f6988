"""Whole runs through `run_train.py` on each kind of data: LitGPT's loop, our hooks, padding, W&B, resume."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.data import PreparedCorpus, TinyStories
from litgpt_moe_ext.data.pipeline.store.wandb_artifacts import log_corpus
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from tests.data.test_text import TRAIN, VAL, tiny_txt
from tests.data.test_wandb import clean  # noqa: F401
from tests.data.test_wandb_online import PROJECT, REFERENCE, server  # noqa: F401
from tests.runs import PATIENCE, ROOT, logged

pytestmark = pytest.mark.slow


def losses(out_dir) -> list[float]:
    return [float(loss) for loss in logged(out_dir, "loss").values()]


def run(file, *arguments) -> None:
    assert main(["--config", str(file), *arguments]) == 0


def stories(tmp_path, **settings) -> dict:
    tiny_txt(tmp_path)
    init_args = {
        "source_path": str(tmp_path),
        "data_path": str(tmp_path / "cache"),
        "bpe": {"vocab_size": 300},
        **settings,
    }
    return {"class_path": "litgpt_moe_ext.data.TinyStories", "init_args": init_args}


@pytest.mark.parametrize("packing", ["stream", "best_fit", "pad"])
def test_text(recipe, tmp_path, packing):
    run(recipe(data=stories(tmp_path, packing=packing)))
    found = losses(tmp_path / "out")
    assert len(found) == 12
    assert found[-1] < found[0] - 0.3
    assert (tmp_path / "out" / "final" / "tokenizer.json").is_file()


def test_resume_in_the_middle_of_an_epoch(recipe, tmp_path):
    data = stories(tmp_path, packing="best_fit")
    train = {"max_tokens": 30 * 4 * 32, "save_interval": 7}
    run(recipe("whole", data=data, train=train, out_dir=str(tmp_path / "whole")))
    parts = recipe("parts", data=data, train=train, out_dir=str(tmp_path / "parts"))
    run(parts, "--train.max_steps", "7")
    run(parts, "--resume", str(tmp_path / "parts" / "step-00000007"))
    assert logged(tmp_path / "parts", "loss") == logged(tmp_path / "whole", "loss")


RANK = """
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from litgpt_moe_ext.data.loader import TokenLoader
from litgpt_moe_ext.data.packing import document_lengths, pack
from litgpt_moe_ext.data.pipeline.store.finished import open_corpus, read_manifest
from litgpt_moe_ext.data.windows import DocumentWindows

corpus, folder, meeting = map(Path, sys.argv[1:4])
rank, batches, stop = map(int, sys.argv[4:])
shards, _ = open_corpus(corpus)
packing = pack(document_lengths(shards, read_manifest(corpus)["eos_id"]), 32, together=True)
loader = TokenLoader(DocumentWindows(shards, packing, 32), 2, train=True)  # before the process group, as LitGPT does
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
state = folder / "state.pt"  # the same for all ranks
seen = folder / f"seen_{rank}.txt"
if state.is_file():
    saved = torch.load(state, weights_only=True)
    loader.load_state_dict(saved["loader"])
    lines = seen.read_text().splitlines(keepends=True)
    seen.write_text("".join(lines[: saved["batches"]]))  # what came after the checkpoint did not happen
count = len(seen.read_text().splitlines()) if seen.is_file() else 0
with open(seen, "a") as file:
    while count < batches:
        for batch in loader:
            print(*batch.flatten().tolist(), file=file, flush=True)
            dist.barrier()
            count += 1
            if count % 4 == 0 and rank == 0:
                torch.save({"loader": loader.state_dict(), "batches": count}, folder / "partial.pt")
                (folder / "partial.pt").rename(state)
            if count == stop and rank == 0:
                print(count, flush=True)
                signal.pause()
            if count == batches:
                break
"""


def start_ranks(corpus, folder, batches: int, stop: int) -> list[subprocess.Popen]:
    """Start two ranks in a process group of their own; the first says when it has seen `stop` batches, and waits."""
    folder.mkdir(exist_ok=True)
    command, processes = [sys.executable, "-c", RANK, corpus, folder, folder / f"meeting_{stop}"], []
    for rank in range(2):
        numbers = [str(rank), str(batches), str(stop)]
        group = processes[0].pid if processes else 0
        processes.append(
            subprocess.Popen([*command, *numbers], stdout=subprocess.PIPE, text=True, cwd=ROOT, process_group=group)
        )
    return processes


def said(line: str) -> bool:
    """Return whether a rank wrote a line, and not its torch, whose older versions tell whom it has met."""
    return not line.startswith("[Gloo]")


def test_two_killed_processes_go_on_with_the_same_tokens(tmp_path):
    """Each rank gets the same tokens in the same order as if nobody had been killed, and together all of an epoch."""
    data = tiny_txt(tmp_path)
    data.prepare_data()
    alone = PreparedCorpus(data.corpus_path, packing="best_fit")
    alone.connect(batch_size=4, max_seq_length=32)
    alone.setup()
    loader = alone.train_dataloader()
    epoch = len(loader)
    batches = epoch + epoch // 2
    expected = [batch.view(2, -1).tolist() for batch in (*loader, *loader)][:batches]
    for stop in (epoch // 3, 0):  # killed within the first epoch; then on, into the second
        processes = start_ranks(data.corpus_path, tmp_path / "ranks", batches, stop)
        if stop:
            assert next(filter(said, iter(processes[0].stdout.readline, ""))) == f"{stop}\n"
            os.killpg(processes[0].pid, signal.SIGKILL)  # at once: one that has lost the other ends by itself
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert not [line for output in outputs for line in output.splitlines() if said(line)]
        assert [process.returncode for process in processes] == [-signal.SIGKILL if stop else 0] * 2
    for rank in range(2):
        seen = (tmp_path / "ranks" / f"seen_{rank}.txt").read_text().splitlines()
        assert [[int(token) for token in line.split()] for line in seen] == [both[rank] for both in expected]


@pytest.mark.parametrize("workers", [0, 3])
def test_streamed_chunks_go_on_with_the_same_tokens(tmp_path, recipe, workers, capfd):
    """LitGPT's own module over litdata, with and without worker processes: losses as if nothing had happened."""
    data = chunks(tmp_path, workers)
    tokenizer_dir = str(tmp_path / "tokenizer")
    train = {"max_tokens": 16 * 4 * 32, "save_interval": 7}
    run(recipe("whole", data=data, train=train, tokenizer_dir=tokenizer_dir, out_dir=str(tmp_path / "whole")))
    parts = recipe("parts", data=data, train=train, tokenizer_dir=tokenizer_dir, out_dir=str(tmp_path / "parts"))
    run(parts, "--train.max_steps", "7")
    # A run that trains nothing saves the place that it has found, which litdata itself would move by a worker.
    run(parts, "--train.max_steps", "7", "--resume", str(tmp_path / "parts" / "step-00000007"))
    run(parts, "--resume", str(tmp_path / "parts" / "final"))
    assert logged(tmp_path / "parts", "loss") == logged(tmp_path / "whole", "loss")
    # litdata itself would take the place of another number of sequences without a word.
    assert main(["--config", str(parts), "--resume", "true", "--train.micro_batch_size", "1"]) == 2
    assert "litdata can resume only with 2 on 1 process," in capfd.readouterr().err


def test_token_shards_and_their_vocabulary(recipe, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    tokens = np.tile(np.arange(300, dtype="<u2"), 20)
    for number, part in enumerate(np.array_split(tokens, 3)):
        np.save(shards / f"edu_{'train' if number else 'val'}_{number:06}.npy", part)
    data = {"class_path": "litgpt_moe_ext.data.TokenShards", "init_args": {"data_path": str(shards)}}
    run(recipe(data=data))
    found = losses(tmp_path / "out")
    assert found[-1] < found[0] - 0.3
    assert "ids below 304" in capsys.readouterr().out
    np.save(shards / "edu_train_000001.npy", np.full(500, 304, "<u2"))
    assert main(["--config", str(recipe(data=data))]) == 2
    assert "edu_train_000001.npy has token id 304 at token 0 (byte 128)" in capsys.readouterr().err


def test_an_artifact_instead_of_the_recipes_data(recipe, tmp_path, server, corpus, capsys):  # noqa: F811
    log_corpus(corpus, "tokens", PROJECT)
    run(recipe(), "--wandb-dataset", REFERENCE, "--wandb-artifacts-dir", str(tmp_path / "artifacts"))
    assert f"Using the W&B artifact {REFERENCE} in {tmp_path / 'artifacts' / 'tokens-v0'}" in capsys.readouterr().out
    assert losses(tmp_path / "out")


def chunks(tmp_path, workers: int) -> dict:
    """Chunks in litdata's format, written without its processes, which take minutes to start on a busy machine."""
    from litdata.streaming import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    train_bpe(TRAIN, BPESettings(300), tmp_path / "tokenizer")
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    for split, texts in (("train", TRAIN), ("val", VAL)):
        writer = BinaryWriter(str(tmp_path / split), chunk_bytes="50MB", item_loader=TokensLoader(block_size=33))
        for number, text in enumerate(texts):
            writer[number] = tokenizer.encode(text, eos=True)
        writer.done()
        writer.merge(1)
    init_args = {"data_path": str(tmp_path), "split_names": ["train", "val"], "num_workers": workers}
    return {"class_path": "litgpt.data.LitData", "init_args": init_args}


def test_the_settings_of_a_run_name_its_data(recipe, tmp_path):
    run(recipe(data=stories(tmp_path)), "--train.max_steps", "1")
    text = (tmp_path / "out" / "final" / "hyperparameters.yaml").read_text()
    assert "vocab_size: 300" in text
    assert TinyStories.__name__ in text
