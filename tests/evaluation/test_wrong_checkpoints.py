"""What LitGPT's own commands say about a path that is no checkpoint: one line, with the checkpoint that is meant."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import litgpt.chat.base
import litgpt.eval.evaluate
import litgpt.finetune.lora
import litgpt.generate.adapter
import litgpt.generate.adapter_v2
import litgpt.generate.base
import litgpt.generate.full
import litgpt.generate.sequentially
import litgpt.generate.tp
import litgpt.pretrain
import litgpt.scripts.convert_hf_checkpoint
import litgpt.scripts.convert_lit_checkpoint
import litgpt.scripts.convert_pretrained_checkpoint
import litgpt.scripts.merge_lora
import litgpt.scripts.validate
import pytest
import torch
from litgpt import GPT, LLM
from litgpt.utils import save_config

from litgpt_moe_ext.errors import SettingsError
from tests.models import dense_config, moe_config

COMMANDS = {
    "generate": litgpt.generate.base.main,
    "chat": litgpt.chat.base.main,
    "evaluate": partial(litgpt.eval.evaluate.convert_and_evaluate, tasks="piqa"),
    "convert_from_litgpt": partial(
        litgpt.scripts.convert_lit_checkpoint.convert_lit_checkpoint, output_dir=Path("out")
    ),
    "convert_pretrained": partial(
        litgpt.scripts.convert_pretrained_checkpoint.convert_pretrained_checkpoint, output_dir=Path("out")
    ),
    "LLM": LLM.load,
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> None:
    """The folder of a run with two checkpoints, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("step-00000010", "final"):
        (tmp_path / "runs/mine" / name).mkdir(parents=True)
        (tmp_path / "runs/mine" / name / "lit_model.pth").touch()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_checkpoint_of_a_runs_folder_is_named(command: Callable):
    with pytest.raises(SettingsError) as refused:
        command(Path("runs/mine"))
    assert str(refused.value) == "checkpoint_dir: 'runs/mine' has no lit_model.pth; did you mean runs/mine/final?"
    assert sorted(path.name for path in Path().iterdir()) == ["runs"]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_folder_of_a_file_is_named(command: Callable):
    with pytest.raises(SettingsError, match=r"^checkpoint_dir: .* is a file; name its folder, 'runs/mine/final'$"):
        command(Path("runs/mine/final/lit_model.pth"))


@pytest.mark.parametrize("name", ["chat", "evaluate", "convert_from_litgpt", "convert_pretrained", "LLM"])
def test_a_working_directory_without_weights_is_named(name: str, monkeypatch):
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    with pytest.raises(SettingsError, match=rf"^checkpoint_dir: '{Path.cwd()}' is missing the files: .'lit_model.pth'"):
        COMMANDS[name](Path("."))


@pytest.mark.parametrize("path", ["/nowhere/mine", "runs/nowhere", "runs/nowhere/final", "checkpoints/mine"])
@pytest.mark.parametrize("name", ["chat", "evaluate", "convert_from_litgpt", "convert_pretrained", "LLM"])
def test_a_path_to_nothing_is_refused_in_a_line(name: str, path: str):
    with pytest.raises(SettingsError, match=r"^checkpoint_dir: \S+ is (not a checkpoint directory|neither)") as refused:
        COMMANDS[name](Path(path))
    assert Path(path).name in str(refused.value)
    assert "\n" not in str(refused.value)
    # Callers of LitGPT from Python expect one.
    assert isinstance(refused.value, FileNotFoundError)
    assert sorted(found.name for found in Path().iterdir()) == ["runs"]


def test_a_folder_of_shards_is_named():
    Path("shards/lit_model.pth").mkdir(parents=True)
    with pytest.raises(
        SettingsError, match=r"but there is a folder of that name with shards; `fabric consolidate shards/lit"
    ):
        litgpt.generate.base.main(Path("shards"))


def test_weights_that_are_cut_off_are_named():
    file = Path("runs/mine/final/lit_model.pth")
    with pytest.raises(SettingsError, match=rf"^checkpoint_dir: {file} is damaged or cut off; copy it again"):
        litgpt.generate.base.load_checkpoint(None, SimpleNamespace(config=moe_config()), file)


@pytest.mark.parametrize("command", [litgpt.generate.tp.main, litgpt.generate.sequentially.main])
def test_a_training_checkpoint_is_no_weights_alone(command: Callable):
    Path("the final").mkdir()
    torch.save({"model": {}, "iter_num": 1}, "the final/lit_model.pth")
    with pytest.raises(SettingsError) as refused:
        command(Path("the final"))
    assert str(refused.value) == (
        "checkpoint_dir: 'the final' is a training checkpoint, but this command needs the weights alone; write them "
        "with `litgpt convert_pretrained_checkpoint 'the final' OUTPUT_DIR`, or use litgpt generate, which takes both"
    )


def test_a_training_checkpoint_is_no_weights_to_start_from(monkeypatch):
    """But for this package's training, whose fabric finds them in it."""
    Path("final").mkdir()
    torch.save({"model": {}, "iter_num": 1}, "final/lit_model.pth")
    given = dict.fromkeys(inspect.signature(litgpt.pretrain.main).parameters)
    given |= {"fabric": lightning.Fabric(accelerator="cpu", devices=1), "initial_checkpoint_dir": Path("final")}
    with pytest.raises(SettingsError) as refused:
        litgpt.pretrain.main(**given | {"config": dense_config(), "data": SimpleNamespace()})
    assert str(refused.value) == (
        "initial_checkpoint_dir: 'final' is a training checkpoint, but this command needs the weights alone; "
        "write them with `litgpt convert_pretrained_checkpoint final OUTPUT_DIR`, or use litgpt-moe train, which takes "
        "both"
    )


def test_a_training_checkpoint_is_no_weights_to_merge_with():
    """Said before the training, not after it."""
    Path("final").mkdir()
    torch.save({"model": {}, "iter_num": 1}, "final/lit_model.pth")
    given = dict.fromkeys(inspect.signature(litgpt.finetune.lora.main).parameters)
    with pytest.raises(SettingsError, match="^checkpoint_dir: 'final' is a .*, or use litgpt finetune_full, which"):
        litgpt.finetune.lora.main(**given | {"checkpoint_dir": Path("final"), "config": dense_config()})


@pytest.mark.parametrize("module", ["lora", "adapter", "adapter_v2"])
def test_layers_that_cannot_be_finetuned_are_named_before_data_are_prepared(module: str):
    """And before the weights, whose conversion would be for nothing."""
    finetune = importlib.import_module(f"litgpt.finetune.{module}")
    given = dict.fromkeys(inspect.signature(finetune.main).parameters)
    save_config(moe_config(attention_class_name="SinkAttention"), Path())
    config = importlib.import_module(f"litgpt.{module}").Config.from_file("model_config.yaml")
    with pytest.raises(SettingsError, match="finetune_full"):
        finetune.main(**given | {"config": config})


@pytest.mark.parametrize(
    ("setting", "command"),
    [
        ("checkpoint_dir", litgpt.generate.adapter.main),
        ("checkpoint_dir", litgpt.generate.adapter_v2.main),
        ("pretrained_checkpoint_dir", partial(litgpt.scripts.merge_lora.merge_lora, Path("lora"))),
    ],
)
def test_a_training_checkpoint_is_nothing_to_put_trained_parts_into(setting: str, command: Callable):
    Path("final").mkdir()
    torch.save({"model": {}, "iter_num": 1}, "final/lit_model.pth")
    with pytest.raises(
        SettingsError, match=f"^{setting}: 'final' is a .* `litgpt convert_pretrained_checkpoint final OUTPUT_DIR`$"
    ):
        command(Path("final"))


def test_weights_alone_are_no_training_checkpoint_to_convert():
    """Said before a folder is made for the result."""
    Path("bare").mkdir()
    torch.save({"lm_head.weight": torch.ones(1)}, "bare/lit_model.pth")
    save_config(moe_config(), Path("bare"))
    with pytest.raises(SettingsError, match="^checkpoint_dir: 'bare' has the weights alone already; use it as it is$"):
        COMMANDS["convert_pretrained"](Path("bare"))
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [litgpt.generate.full.main, litgpt.generate.adapter.main])
def test_prompts_without_the_mark_after_which_a_command_prints(command: Callable):
    Path("final").mkdir()
    save_config(moe_config(), Path("final"))
    with pytest.raises(SettingsError, match="^checkpoint_dir: prompts of 'final' .Default. have no '### Response:', "):
        command(Path("final"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (litgpt.scripts.convert_hf_checkpoint.convert_hf_checkpoint, "'exported' is not a supported config name"),
        (COMMANDS["chat"], "'exported' is neither .* `litgpt download list` names"),
    ],
)
def test_an_export_is_imported(command: Callable, said: str):
    Path("exported").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("exported", name).touch()
    with pytest.raises(SettingsError, match=f"^checkpoint_dir: {said}; `litgpt-moe import exported NEW_DIR` makes a"):
        command(Path("exported"))


def test_validate_knows_the_mark_and_all_experts(capsys):
    Path("final").mkdir()
    config, model = moe_config(), GPT(moe_config())
    save_config(config, Path("final"))
    torch.save({"model": model.state_dict()}, "final/lit_model.pth")
    with pytest.raises(SystemExit):  # there is no tokenizer
        litgpt.scripts.validate.validate_setup(Path("final"), dtype="bfloat16", training=True)
    said = capsys.readouterr().out
    assert "Checkpoint keys and shapes match the model" in said
    assert f"Estimated parameters: {sum(weight.numel() for weight in model.parameters()):,}" in said


def test_validate_names_the_remedy_for_fields_of_a_missing_extension(capsys):
    Path("final").mkdir()
    save_config(moe_config(), Path("final"))
    with Path("final/model_config.yaml").open("a") as file:
        file.write("router_whim: 1\n")
    with pytest.raises(SystemExit):
        litgpt.scripts.validate.validate_setup(Path("final"))
    assert "Failed to load config: model_config.yaml has the field router_whim" in capsys.readouterr().err


def test_layers_that_cannot_be_divided_are_named_before_processes_start():
    """Of a training checkpoint as well, whose conversion would be for nothing."""
    Path("final").mkdir()
    torch.save({"model": {}, "iter_num": 1}, "final/lit_model.pth")
    save_config(moe_config(), Path("final"))
    with pytest.raises(SettingsError, match="^mlp_class_name: SharedExpertMoE cannot be divided .* litgpt generate"):
        litgpt.generate.tp.main(Path("final"))
