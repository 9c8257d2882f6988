"""The doctor sees what would keep a recipe from running."""

import pytest
import yaml

from litgpt_moe_ext.analysis import doctor
from litgpt_moe_ext.analysis.recipes import Recipe
from litgpt_moe_ext.console.main import main
from tests.models import moe_config

MODEL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "padded_vocab_size": 64, "vocab_size": 64}


def verdicts(settings: dict) -> dict[str, str]:
    return {finding.topic: finding.verdict for finding in doctor.examine(Recipe(moe_config(), settings))}


def test_a_recipe_that_can_run(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": {"data_path": str(tmp_path / "data")}}
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "out_dir": str(tmp_path / "out"), "data": data}))
    assert main(["doctor", str(recipe)]) == 0
    page = capsys.readouterr().out
    for topic in (
        "versions",
        "CPU",
        "compile",
        "experts",
        "flash attention",
        "precision",
        "strategy",
        "memory",
        "data",
        "disk",
    ):
        assert topic in page
    assert "can run here" in page
    assert not (tmp_path / "out").exists(), "looking changes nothing"


@pytest.mark.parametrize(
    ("settings", "topic"),
    [
        ({"data": {"class_path": "litgpt_moe_ext.data.Nothing"}}, "data"),
        (
            {"data": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": {"source_path": "/no/such"}}},
            "data",
        ),
        ({"tokenizer_dir": "/no/such/tokenizer"}, "tokenizer"),
        ({"precision": "64-quantum"}, "precision"),
        ({"strategy": "ddp", "distributed": {"cpu_offload": True}}, "strategy"),
    ],
)
def test_problems_are_found(settings, topic):
    assert verdicts(settings)[topic] == "problem"
    assert verdicts({})[topic] != "problem"


def test_a_full_disk_is_a_problem(monkeypatch):
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert verdicts({})["disk"] == "problem"


def test_the_exit_status_tells(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "tokenizer_dir": str(tmp_path / "nothing")}))
    assert main(["doctor", str(recipe)]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert main(["doctor"]) == 0
