"""The first and the last moments of a run."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.training.phases.report import flags_to_continue
from litgpt_moe_ext.training.settings import TrainArgs
from tests.runs import logged, train


def test_validation_before_the_first_step_is_kept(recipe, tmp_path, capsys):
    """It is logged under step 0, and untrained weights are nobody's best."""
    file = recipe(train={"max_tokens": 2 * 128}, eval={"interval": 99, "initial_validation": True})
    assert train("--config", file) == 0
    assert list(logged(tmp_path / "out", "val_loss")) == [0, 2]
    output = capsys.readouterr().out
    assert "after step 2" in output
    assert output.index("  validation loss") < output.index("step 1/2 |")


def test_last_step_on_the_interval_validates_once(recipe, tmp_path, capsys):
    file = recipe(train={"max_tokens": 4 * 128, "save_interval": None}, eval={"interval": 2})
    assert train("--config", file) == 0
    assert capsys.readouterr().out.count("  validation loss") == 2
    assert list(logged(tmp_path / "out", "val_loss")) == [2, 4]
    assert (tmp_path / "out" / "best").is_dir()


@pytest.mark.parametrize(
    ("max_tokens", "max_steps", "step", "flags"),
    [
        (120, 2, 2, "--train.max_steps 4"),
        (30, 2, 2, "--train.max_steps 3"),
        (20, 2, 2, "--train.max_tokens 40 --train.max_steps null"),
        (25, None, 2, "--train.max_tokens 50"),
        (30, None, 8, "--train.max_tokens 180"),  # which was longer before
        (120, 5, 8, "--train.max_steps 12"),
        (120, 5, 3, ""),  # ended by train.max_time
        (120, None, 3, ""),
    ],
)
def test_the_way_on(max_tokens, max_steps, step, flags):
    """Flags that train further, instead of ending where the run ended."""
    train_args = TrainArgs(max_tokens=max_tokens, max_steps=max_steps)
    plan = SimpleNamespace(settings=SimpleNamespace(train=train_args, data=None), tokens_per_step=10, steps_ahead=0)
    assert flags_to_continue(plan, step).strip() == flags


def test_the_way_on_leads_on(recipe, capsys):
    file = str(recipe(train={"max_tokens": 12 * 128, "max_steps": 2}))
    assert train("--config", file) == 0
    flags = capsys.readouterr().out.splitlines()[-1].removeprefix("To continue: ").split()
    assert train("--config", file, *flags) == 0
    assert "step 3/4 |" in capsys.readouterr().out


def test_what_is_saved_before_the_first_batch_has_the_generators_of_the_checkpoint(recipe, tmp_path):
    """As when a run has lost its `final`, and saves it from the last step; a signal may save as early."""
    train_settings = {"max_tokens": 2 * 128, "save_interval": 2}
    file = str(recipe(train=train_settings, model_config={"router_jitter_noise": 0.1}))
    saved, final = [], tmp_path / "out" / "final"
    for _ in range(2):
        assert train("--config", file, "--resume", "auto") == 0
        saved.append(torch.load(final / "lit_model.pth", weights_only=True)["rng"][0]["torch"])
        shutil.rmtree(final)
    assert torch.equal(*saved)


def test_what_cannot_be_given_is_said(recipe, capsys):
    """Tokens beyond the last whole step, and a warm-up longer than the run."""
    assert train("--config", recipe(train={"max_tokens": 2 * 128 + 7, "lr_warmup_steps": 5})) == 0
    output = capsys.readouterr().out
    assert "train.max_tokens: 263 ends within a step: nothing is trained on the last 7 tokens" in output
    assert "train.lr_warmup_steps: 5 of 2 steps: the learning rate rises to the end" in output


def test_a_loss_without_a_perplexity(recipe, tmp_path):
    """Of a run that has gone astray: no float is so large, and the run goes on to its end."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e3}}
    file = recipe(train={"max_steps": 4, "lr_warmup_steps": 12}, eval={"interval": 3}, optimizer=optimizer)
    assert train("--config", file) == 0
    assert list(logged(tmp_path / "out", "val_ppl").values()) == ["inf", "inf"]


def test_weights_that_are_not_finite_are_not_final(recipe, tmp_path, capsys):
    """The run says so, fails, and leaves neither `final` nor `best`."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e39}}
    file = recipe(train={"max_tokens": 128, "lr_warmup_steps": None, "save_interval": None}, optimizer=optimizer)
    assert train("--config", file) == 1
    assert "the weights after step 1 are not finite, so they are not saved as final" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name in ("final", "best")] == []
