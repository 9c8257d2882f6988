"""What the card of an exported model says of its training."""

from dataclasses import replace
from pathlib import Path

import yaml

from litgpt_moe_ext.export.card import facts
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.export.source import Source
from litgpt_moe_ext.model_size import count_flops, count_parameters
from litgpt_moe_ext.training.callbacks.retention import Retention
from litgpt_moe_ext.training.checkpoint import hyperparameters
from litgpt_moe_ext.training.checkpoint.progress import Progress
from litgpt_moe_ext.training.logs import METRICS_FILE
from litgpt_moe_ext.training.settings import CheckpointArgs
from tests.models import moe_config
from tests.runs import train


def test_parameters_are_those_of_the_run(tmp_path):
    source = Source(tmp_path, moe_config(), {})
    counts = [facts(source, {"train": {"tie_embeddings": tied}})["parameters"] for tied in (True, False)]
    sizes = [count_parameters(moe_config(), tied) for tied in (True, False)]
    assert [count.partition(";")[0] for count in counts] == [
        f"{size.total:,}, of which {size.active:,} are active per token" for size in sizes
    ]
    assert counts[0].endswith("; the output head, one table with the embeddings in training, is written twice")
    assert counts[1] == facts(source, {})["parameters"]


def test_what_is_known_of_a_training(tmp_path):
    """Eight steps of four sequences, then two of eight after a resume, in micro-batches of two on two processes."""
    settings = {
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_seq_length": 16},
        "data": {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {}},
    }
    checkpoint = tmp_path / "step-00000010"
    checkpoint.mkdir()
    (checkpoint / hyperparameters.FILE_NAME).write_text(yaml.safe_dump(settings))
    Progress(attempt=2, step=10, iteration=12, processes=2, saved_at=0.0).write(checkpoint)
    rows = ("step,train_loss,val_loss", "8,3.5,", "8,,3.25", "10,3.125,", "12,2.5,2.25")
    (tmp_path / METRICS_FILE).write_text("\n".join(rows))
    run = {
        "callbacks": {"Retention": Retention(CheckpointArgs(), tmp_path, None, None).state_dict()},
        "train_dataloader": {"fingerprint": {"corpus": "0123abcd"}},
    }
    source = Source(checkpoint, moe_config(), {}, run)
    found = facts(source, settings)
    flops = count_flops(source.config, 16, training=True) / 16 * 768
    assert dict(list(found.items())[3:]) == {
        "optimizer steps": "10",
        "training tokens": "768",
        "FLOPs of the training": f"{flops:.2e}",
        "training loss": "3.1250",
        "validation loss": "3.2500",
        "data": "`litgpt_moe_ext.data.TextCorpus`",
        "hash of the data": "`0123abcd`",
    }
    mixed = {"train_dataloader": {"fingerprint": {"corpora": [["code", "4567", 8], ["prose", "89ab", 16]]}}}
    hashes = facts(replace(source, run=mixed), settings)["hashes of the data"]
    assert hashes == "code `4567`, prose `89ab`"
    keeper = Retention(CheckpointArgs(), tmp_path, None, None)
    keeper.load_state_dict({"loss": 3.1875, "attempt": 1, "step": 6})
    run["callbacks"]["Retention"] = keeper.state_dict()
    assert facts(source, settings) == {**found, "best validation loss": "3.1875"}


def test_a_moving_average_is_known_by_the_checkpoint_around_it(recipe, tmp_path, monkeypatch, capsys):
    assert train("--config", recipe(ema={"decay": 0.5}), "--train.max_steps", "2") == 0
    final = tmp_path / "out" / "final"
    monkeypatch.chdir(final / "ema")
    for directory, out, dtype in ((final, "whole", None), (Path(), "average", "bfloat16")):
        export(directory, tmp_path / out, "hf", dtype)
    whole, average = ((tmp_path / out / "README.md").read_text() for out in ("whole", "average"))
    assert "# tiny\n" in whole
    assert "`litgpt-moe export final ... --format hf`." in whole
    assert "`litgpt-moe export final/ema ... --format hf --dtype bfloat16`." in average
    rows = [[line for line in card.splitlines() if line.startswith("| ")] for card in (whole, average)]
    assert rows[0][5] == "| optimizer steps | 2 |"
    weights = "| weights | moving average over the steps (`ema.decay`) |"
    # The run validated the weights that it trained, and not their average.
    assert rows[1] == [
        *rows[0][:5],
        weights,
        *(line.replace("loss |", "loss, before averaging |") for line in rows[0][5:]),
    ]
    assert sum("loss" in line for line in rows[0]) == 3
    (final / "lit_model.pth").unlink()
    export(final / "ema", tmp_path / "alone", "hf")
    assert "hash of the data" not in (tmp_path / "alone" / "README.md").read_text()
