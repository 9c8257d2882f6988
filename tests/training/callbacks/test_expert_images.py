"""Heat maps of the experts' load in the loggers that show pictures."""

from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from lightning.fabric.loggers import TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger

from litgpt_moe_ext.training.callbacks import expert_images
from litgpt_moe_ext.training.callbacks.expert_images import NAME, ExpertImages, LoadHistory
from litgpt_moe_ext.training.fabric import TrainingFabric
from tests.runs import train


def test_history_keeps_everything_in_few_columns():
    """The mean over all columns, weighted by their log lines, stays that of the lines; steps stay in order."""
    history, lines = LoadHistory(most=8), 29
    for step in range(1, lines + 1):
        history.add(step, {0: [step, 2 * step], 3: [1.0, 1.0]})
    steps, layers = history.layers()
    # Twice halved: seven columns of four lines, and one line that waits.
    assert steps == [2.5 + 4 * i for i in range(7)] + [29]
    assert list(layers) == [0, 3]
    assert np.array_equal(layers[0], [steps, [2 * step for step in steps]])
    assert np.array_equal(layers[3], np.ones((2, 8)))


@pytest.mark.slow
def test_tensorboard(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--config", recipe(), "--logger_name", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard" / "version_0"))
    events.Reload()
    pictures = events.Images(NAME)
    assert [picture.step for picture in pictures] == [4, 8, 12]
    assert pictures[0].width > 300
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    assert pictures[0].encoded_image_string != pictures[2].encoded_image_string
    assert [event.step for event in events.Scalars("moe_load_00/expert_07")] == list(range(1, 13))


def test_dense_models_have_none(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    moe = ("n_expert", "n_expert_per_token", "n_shared_expert", "moe_intermediate_size", "norm_topk_prob")
    dense = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 24, **dict.fromkeys((*moe, "router_bias_update_rate"))}
    file = recipe(model_config=dense, train={"max_tokens": 4 * 128})
    assert train("--config", file, "--logger_name", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard" / "version_0"))
    events.Reload()
    assert NAME not in events.Tags()["images"]


@pytest.mark.parametrize(("kind", "method"), [(TensorBoardLogger, "experiment.add_image"), (WandbLogger, "log_image")])
def test_a_picture_that_cannot_be_written_ends_no_run(monkeypatch, kind, method):
    said, logger = [], Mock(kind, **{f"{method}.side_effect": OSError("No space left\non device")})
    monkeypatch.setattr(expert_images, "_draw", lambda *_: np.zeros((1, 1, 3)))
    fabric = TrainingFabric(said.append, accelerator="cpu", devices=1, loggers=[logger])
    images = ExpertImages("tiny", fabric)
    for _ in range(2):
        images.on_logged({"loss": 1.0, "val_loss": 1.0, "moe_load_00/expert_00": 1.0})
    assert said == ["  the logger failed: No space left on device. Training goes on."]


def test_other_processes_draw_nothing(monkeypatch):
    """The others have no logger that shows it."""
    drawn = []
    monkeypatch.setattr(expert_images, "_draw", lambda *_: drawn.append(1))
    for first in (False, True):
        images = ExpertImages("tiny", MagicMock(is_global_zero=first, step=1))
        images.on_logged({"loss": 1.0, "val_loss": 1.0, "moe_load_00/expert_00": 1.0})
        assert len(drawn) == first


@pytest.mark.slow
def test_wandb(recipe, tmp_path, monkeypatch):
    """Without a connection the pictures wait on the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train("--config", recipe(train={"max_tokens": 8 * 128}), "--logger_name", "wandb") == 0
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/moe/*.png"))
    assert len(pictures) == 2
