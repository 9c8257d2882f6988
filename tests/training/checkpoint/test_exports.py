"""Checkpoints are exported at the end of a run, and no fault of that harms it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoTokenizer

from litgpt_moe_ext.cli.main import main as console
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.training.checkpoint.exports import export_checkpoints
from litgpt_moe_ext.training.settings import CheckpointArgs
from tests.runs import logged, train

NO_SINKS = {"attention_sinks": False, "norm_qk": True}


def train_four_steps(file: Path, *arguments: str) -> int:
    return train("--config", file, "--train.max_steps", "4", *arguments)


def test_best_and_final_in_both_formats(recipe, tmp_path, capsys):
    settings = yaml_of(recipe(), NO_SINKS)
    assert train_four_steps(recipe(model_config=settings, checkpoint={"export": ["hf", "gguf"]})) == 0
    exported = tmp_path / "out" / "exported"
    assert {path.name for path in exported.iterdir()} == {"best-hf", "final-hf", "best-gguf", "final-gguf"}
    assert json.loads((exported / "final-hf" / "config.json").read_text())["model_type"] == "glm4_moe"
    assert AutoTokenizer.from_pretrained(exported / "best-hf")("def f").input_ids
    assert (exported / "final-gguf" / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert capsys.readouterr().out.count("Wrote ") == 4


def test_chats_are_written_as_the_tokenizer_of_the_data_says(recipe, corpus_settings, finished, tmp_path):
    theirs = finished(tmp_path / "theirs") / "final"
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"source_path": corpus_settings["source_path"], "pattern": "*.py", "tokenizer_dir": str(theirs)}
    settings |= {"val_fraction": 0.3, "data_path": str(tmp_path / "cache")}
    data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": settings}
    file = recipe(data=data, checkpoint={"best": False})
    assert train("--config", file, "--train.max_steps", "1", "--checkpoint.export", "hf") == 0
    exported = tmp_path / "out" / "exported" / "final-hf"
    assert AutoTokenizer.from_pretrained(exported).chat_template == "{{ messages }}"


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_exports_in_the_place_of_an_earlier_end(tmp_path, monkeypatch, first):
    said = []
    monkeypatch.setattr("litgpt_moe_ext.export.formats.export", lambda _, out_dir, name: [name, out_dir.exists()])
    for name in ("best", "final", "exported/final-hf"):
        (tmp_path / name).mkdir(parents=True)
    plan = SimpleNamespace(out_dir=tmp_path, settings=SimpleNamespace(checkpoint=CheckpointArgs(export="hf")))
    export_checkpoints(SimpleNamespace(plan=plan, fabric=SimpleNamespace(is_global_zero=first, print=said.append)))
    assert said == [False, False] * first


def test_a_fault_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    def fails(checkpoint, out_dir, name):
        if "best" in out_dir.name:
            raise RuntimeError("no space\nleft")
        return export(checkpoint, out_dir, name)

    monkeypatch.setattr("litgpt_moe_ext.export.formats.export", fails)
    assert train_four_steps(recipe(), "--checkpoint.export", "hf") == 0
    out_dir = tmp_path / "out"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "Warning" in line)
    best = out_dir / "best"
    assert line == (
        f"Warning: {best} was not exported (no space left). "
        f"To repeat: litgpt-moe export {best} {out_dir}/exported/best-hf --format hf"
    )
    assert (out_dir / "exported" / "final-hf" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint.export", "gguf"], "checkpoint.export: gguf: no graph .*glm4moe has no sinks: all"),
        (["--checkpoint.export", "[onnx]"], "checkpoint.export"),
        (
            ["--checkpoint.export", "hf", "--model_config.router_type", "hash"],
            "checkpoint.export: hf: model_config.router_type: hash must be one of topk",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_training(recipe, tmp_path, capsys, arguments, message):
    file = recipe()
    if "hash" in arguments:
        kept = yaml_of(file, {"router_bias_update_rate": None, "norm_topk_prob": None, "router_type": "hash"})
        file, arguments = recipe(model_config=kept), arguments[:2]
    assert train_four_steps(file, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "final").exists()


def yaml_of(file: Path, changes: dict) -> dict:
    return {**yaml.safe_load(file.read_text())["model_config"], **changes}


@pytest.mark.slow
def test_what_was_imported_trains_on(recipe, tmp_path):
    """With the loss that it had; `litgpt-moe experts` looks inside."""
    settings = yaml_of(recipe(), NO_SINKS)
    assert train_four_steps(recipe(model_config=settings)) == 0
    exported, imported = str(tmp_path / "hf"), str(tmp_path / "imported")
    assert console(["export", str(tmp_path / "out" / "final"), exported]) == 0
    assert console(["import", exported, imported]) == 0
    theirs = yaml.safe_load(Path(imported, "model_config.yaml").read_text())
    theirs.pop("_requires_litgpt_moe_ext")
    theirs["router_bias_update_rate"] = 0.0  # here nothing learns
    start = ["--initial_checkpoint_dir", imported, "--out_dir", str(tmp_path / "on")]
    still = ["--optimizer.lr", "0.0", "--train.min_lr", "0.0"]
    changes = {name: theirs.get(name) for name in {*settings, *theirs}}
    assert train_four_steps(recipe(model_config=changes), *start, *still) == 0
    before, after = (logged(tmp_path / name, "val_loss") for name in ("out", "on"))
    assert float(after[4]) == pytest.approx(float(before[4]), abs=1e-5)
    text = tmp_path / "text.py"
    text.write_text("def parse(text):\n    return text.split()\n" * 20)
    assert console(["experts", imported, "--text", str(text), "--out_dir", str(tmp_path / "experts")]) == 0
