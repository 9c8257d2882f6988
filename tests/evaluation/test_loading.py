"""Opening checkpoints from elsewhere: nothing in them runs, and what is broken is said in one line."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import load_model, read_checkpoint
from litgpt_moe_ext.host.checkpoints import read_config
from tests.models import moe_config

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint_dir(llama_dir, tmp_path) -> Path:
    return Path(shutil.copytree(llama_dir, tmp_path / "checkpoint"))


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def assert_refused(checkpoint_dir: Path, *parts: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_model(checkpoint_dir, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ("checkpoint_dir", "lit_model.pth", *parts)), message


def test_a_malicious_checkpoint_runs_nothing(checkpoint_dir, tmp_path, capsys):
    trace = tmp_path / "ran"
    weights = torch.load(checkpoint_dir / "lit_model.pth", weights_only=True)
    torch.save({"model": weights, "hparams": Payload(trace)}, checkpoint_dir / "lit_model.pth")
    assert_refused(checkpoint_dir, "posix.mkdir", "tensors and plain data")
    assert main(["perplexity", str(checkpoint_dir), f"--text={__file__}"]) == 2
    assert "posix.mkdir" in capsys.readouterr().err
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_one_line(checkpoint_dir, kept):
    path = checkpoint_dir / "lit_model.pth"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert_refused(checkpoint_dir, "damaged or cut off")


def test_damage_within_is_one_line(checkpoint_dir):
    path = checkpoint_dir / "lit_model.pth"
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)  # the pickled names and shapes
    path.write_bytes(content)
    assert_refused(checkpoint_dir, "damaged")


def test_a_weight_with_another_bit_is_one_line(checkpoint_dir):
    """Also of a training checkpoint, whose optimizer may be what it likes: nobody reads it here."""
    path = checkpoint_dir / "lit_model.pth"
    model = torch.load(path, weights_only=True)
    marked = torch.arange(64.0).numpy().tobytes()
    model["lm_head.weight"].view(-1)[:64] = torch.arange(64.0)
    moment = torch.full((64,), 7.0)
    torch.save({"model": model, "optimizer": {"state": {0: {"exp_avg": moment}}}}, path)
    content = path.read_bytes()
    assert content.count(marked) == content.count(moment.numpy().tobytes()) == 1
    path.write_bytes(content.replace(moment.numpy().tobytes(), bytes(256)))
    load_model(checkpoint_dir, CPU)
    path.write_bytes(content.replace(marked, b"\x01" + marked[1:]))
    assert_refused(checkpoint_dir, "is damaged in lm_head.weight; copy it again")


def test_other_weights_are_one_line(checkpoint_dir):
    torch.save({"model": {"a": torch.zeros(2)}}, checkpoint_dir / "lit_model.pth")
    assert_refused(checkpoint_dir, "does not fit model_config.yaml")
    torch.save([torch.zeros(2)], checkpoint_dir / "lit_model.pth")
    assert_refused(checkpoint_dir, "holds a list")


def test_a_training_checkpoint_gives_its_weights(checkpoint_dir):
    # A copy, as what is loaded stays in the file that is written below.
    expected = copy.deepcopy(load_model(checkpoint_dir, CPU).state_dict())
    weights = torch.load(checkpoint_dir / "lit_model.pth", weights_only=True)
    torch.save({"model": weights, "optimizer": {"state": {}}, "step_count": 3}, checkpoint_dir / "lit_model.pth")
    assert read_checkpoint(checkpoint_dir / "lit_model.pth")["step_count"] == 3
    loaded = load_model(checkpoint_dir, CPU).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_the_mark_of_this_package_is_known(tmp_path):
    """As LitGPT's own function to save a configuration writes it."""
    from litgpt.utils import save_config

    config = moe_config(attention_class_name="SinkAttention")
    save_config(config, tmp_path)
    assert "_requires_litgpt_moe_ext" in (tmp_path / "model_config.yaml").read_text(encoding="utf-8")
    assert read_config(tmp_path) == config


def test_a_field_of_an_extension_is_named(checkpoint_dir):
    with open(checkpoint_dir / "model_config.yaml", "a", encoding="utf-8") as file:
        file.write("own_sharpness: 2.0\n")
    with pytest.raises(SettingsError, match="has the field own_sharpness, .*; if an extension adds it, install"):
        read_config(checkpoint_dir)
