"""`litgpt-moe schedule` shows the rates that the run has."""

from pathlib import Path
from shutil import copy
from types import SimpleNamespace

import pytest
import yaml
from litgpt import Config

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.cli.train import main as train_main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.runs.schedule import planned_rates, schedule_figure
from litgpt_moe_ext.training.settings import ScheduleArgs, TrainArgs
from tests.runs import logged
from tests.settings import read_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def settings_of(file: Path):
    return read_settings(["--config", str(file)])


@pytest.mark.parametrize("name", ["cosine", "wsd", "onecycle"])
def test_rates_are_those_of_the_run(recipe, tmp_path, name):
    """With accumulation, a warm-up and a floor."""
    train = {"lr_warmup_steps": 3, "min_lr": 1e-3, "micro_batch_size": 2, "save_interval": 1000}
    file = recipe(train=train, schedule={"name": name}, eval={"interval": 1000})
    assert train_main(["--config", str(file)]) == 0
    rates = [float(rate) for rate in logged(tmp_path / "out", "learning_rate").values()]
    assert planned_rates(settings_of(file), name) == rates


def test_max_steps_cuts_the_same_curve(recipe):
    whole = planned_rates(settings_of(recipe("whole")), "cosine")
    cut = planned_rates(settings_of(recipe("cut", train={"max_steps": 5})), "cosine")
    assert len(whole) == 12
    assert cut == whole[:5]


def test_more_steps_than_can_be_drawn(recipe):
    """LitGPT's default number of tokens is that of a training on hundreds of GPUs."""
    settings = settings_of(recipe("default", train={"max_tokens": 3_000_000_000_000}))
    with pytest.raises(
        SettingsError, match=r"^train\.max_tokens: 3000000000000 are [\d,]+ steps of .* train\.max_steps$"
    ):
        planned_rates(settings, "cosine")
    cut = settings_of(recipe("cut", train={"max_tokens": 3_000_000_000_000, "max_steps": 5}))
    assert len(planned_rates(cut, "cosine")) == 5


def test_command(tmp_path, capsys):
    out = tmp_path / "plots" / "schedule.png"
    arguments = ["schedule", str(CONFIGS / "quickstart.yaml"), "--compare", "wsd", "linear", f"--out={out}"]
    assert main(arguments) == 0
    output = " ".join(capsys.readouterr().out.split())  # a long path makes the title wrap
    assert "1,440 steps" in output
    assert "cosine (the recipe's)" in output
    assert "wsd" in output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_and_what_is_neither(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert main(["schedule", str(checkpoint)]) == 2
    assert f"error: recipe: '{checkpoint}' is a folder; name a recipe" in capsys.readouterr().err
    assert main(["schedule", str(tmp_path / "quickstart.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: recipe: '{tmp_path / 'quickstart.yaml'}' cannot be read")
    assert "did you mean" in error
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    del recipe["model_config"]["block_size"]
    recipe["train"] |= {"max_tokens": 4096 * recipe["train"]["global_batch_size"] * 3, "lr_warmup_steps": 1}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["schedule", str(tmp_path / "long.yaml"), f"--out={tmp_path / 'plot.png'}"]) == 0
    assert "3 steps" in capsys.readouterr().out, "LitGPT's models read 4096 tokens where nothing else is said"
    copy(CONFIGS / "quickstart.yaml", checkpoint / "hyperparameters.yaml")
    assert main(["schedule", str(checkpoint), f"--out={tmp_path / 'plot.png'}"]) == 0


def test_figure_shows_the_rates():
    lines = schedule_figure({"wsd": [1.0, 2.0, 1.5], "linear": [2.0, 1.0]}).axes[0].lines
    assert [line.get_label() for line in lines] == ["wsd", "linear"]
    assert lines[0].get_xydata().tolist() == [[1, 1.0], [2, 2.0], [3, 1.5]]


def test_a_warm_up_that_needs_the_data():
    train = TrainArgs(max_tokens=10_000, lr_warmup_steps=None, lr_warmup_fraction=0.1)
    settings = SimpleNamespace(train=train, schedule=ScheduleArgs(), model_config=Config(block_size=8), optimizer="SGD")
    with pytest.raises(ValueError, match="train.lr_warmup_fraction: 0.1 is a part of the data's length"):
        planned_rates(settings, "cosine")


def test_wrong_inputs(tmp_path, capsys):
    assert main(["schedule", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml' cannot be read" in capsys.readouterr().err
    assert main(["schedule", str(CONFIGS / "quickstart.yaml"), "--compare", "wsdd"]) == 2
    assert "wsdd" in capsys.readouterr().err
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    for train, message in (
        ({"epochs": 2}, "train.epochs: 2 depend on"),
        ({"max_tokens": 99}, "train.max_tokens: 99 "),
        ({"global_batch_size": 2, "micro_batch_size": 4}, "train.global_batch_size: 2 is not a multiple"),
        ({"min_lr": 0.5}, "train.min_lr: 0.5 must be at most the optimizer's learning rate"),
    ):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe | {"train": recipe["train"] | train}))
        assert main(["schedule", str(file)]) == 2
        assert message in capsys.readouterr().err
    for changes, message in (
        ({"optimizer": {"class_path": "AdamW", "init_args": {"lr": "fast"}}}, "optimizer.init_args.lr: 'fast' must be"),
        ({"optimizer": {"class_path": "Nothing", "init_args": {"lr": 0.1}}}, "optimizer: 'Nothing' must be the name"),
        ({"model_config": {"block_size": "long"}}, "model_config.block_size: 'long' must be"),
        ({"model_config": None, "model_name": "nothing"}, "model_name: 'nothing' must be one of LitGPT's models"),
    ):
        file.write_text(yaml.safe_dump(recipe | changes))
        assert main(["schedule", str(file)]) == 2
        assert message in capsys.readouterr().err
