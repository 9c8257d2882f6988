"""Models in LitGPT's own layout compute the same; those it cannot express are refused by name."""

from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGUFReader
from litgpt import GPT, Config
from safetensors.torch import load_file

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.export.formats import check_exportable, export
from litgpt_moe_ext.export.llama_moe import convert_checkpoint, obstacles, to_llama_moe
from litgpt_moe_ext.export.source import read_source
from litgpt_moe_ext.inspect.recipes import load_recipe
from litgpt_moe_ext.moe.expert_layouts import unstack_experts
from tests.evaluation.conftest import VOCABULARY_SIZE, write_checkpoint
from tests.evaluation.test_loading import Payload
from tests.models import initialized_model, moe_config, noisy_config

GROUPS = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
NO_SINKS = {"attention_class_name": "SinkAttention", "attention_sinks": False}
YARN = {"factor": 4.0, "original_max_seq_len": 16, "beta_fast": 32.0, "beta_slow": 1.0}
SOFTMAX = {"router_score_function": "softmax", "norm_topk_prob": True}


@pytest.mark.parametrize(
    "config",
    [
        moe_config(**SOFTMAX),
        moe_config(
            **SOFTMAX, n_shared_expert=2, routed_scaling_factor=1.5, first_k_dense_replace=1, intermediate_size=20
        ),
        moe_config(**GROUPS, norm_topk_prob=True),
        moe_config(**GROUPS, norm_topk_prob=False),
        noisy_config(router_z_loss_coef=0.1),
        moe_config(**SOFTMAX, router_load_balancing_loss_coef=0.1, expert_backend="loop"),
        moe_config(**SOFTMAX, **NO_SINKS, n_query_groups=2, norm_qk=True, rotary_percentage=0.5),
        moe_config(**SOFTMAX, router_jitter_noise=0.1, expert_dropout=0.2),
    ],
    ids=["softmax", "shared_dense_scaled", "groups", "groups_plain", "noisy", "loss_and_backend", "attention", "noise"],
)
def test_the_converted_model_computes_the_same(config):
    model = initialized_model(config).eval()
    if config.n_expert_groups:
        for block in model.transformer.h:
            block.mlp.gate.e_score_correction_bias.uniform_(-2, 0)
    converted, state = to_llama_moe(config, model.state_dict())
    assert converted.mlp_class_name == "LLaMAMoE"
    other = GPT(converted).eval()
    other.load_state_dict(state)
    ids = torch.randint(0, 64, (2, 20))
    assert torch.allclose(model(ids), other(ids), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (moe_config(), "router_score_function: sigmoid"),
        (moe_config(router_score_function="softmax"), "norm_topk_prob: False"),
        (moe_config(**GROUPS, router_score_function="softmax"), "groups sigmoid scores only"),
        (moe_config(**SOFTMAX, mlp_activation="relu"), "mlp_activation: relu"),
        (moe_config(**SOFTMAX, attention_class_name="SinkAttention"), "attention_class_name"),
        (moe_config(**SOFTMAX, **NO_SINKS, rope_adjustments=YARN), "attention_class_name"),
        (moe_config(**SOFTMAX, **NO_SINKS, sliding_window_size=4), "attention_class_name"),
        (moe_config(**SOFTMAX, n_shared_expert=1, shared_expert_gate=True), "shared_expert_gate"),
        (moe_config(router_type="hash"), "router_type: hash"),
        (noisy_config(decoder_sparse_step=2, intermediate_size=20), "decoder_sparse_step: 2"),
    ],
)
def test_what_it_cannot_express_is_named(config, named):
    model = initialized_model(config)
    assert any(named in reason for reason in obstacles(config, model.state_dict()))
    with pytest.raises(ValueError, match="cannot express"):
        to_llama_moe(config, model.state_dict())


def test_a_bias_without_groups_is_named():
    config = moe_config(**SOFTMAX)
    model = initialized_model(config)
    assert obstacles(config, model.state_dict()) == []
    model.transformer.h[1].mlp.gate.e_score_correction_bias[3] = 0.1
    assert "e_score_correction_bias" in obstacles(config, model.state_dict())[0]


@pytest.mark.parametrize("name", ["hf", "gguf"])
@pytest.mark.parametrize(
    "settings",
    [
        SOFTMAX,
        {**SOFTMAX, "n_shared_expert": 2, "first_k_dense_replace": 1, "intermediate_size": 20},
        {**GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "n_shared_expert": 1},
    ],
    ids=["softmax", "shared_dense", "groups"],
)
def test_both_layouts_are_exported_as_the_same_model(tmp_path, name, settings):
    write_checkpoint(tmp_path / "ours", moe_config(**settings, padded_vocab_size=VOCABULARY_SIZE))
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    check_exportable(read_source(tmp_path / "theirs").config, name)
    exports = [tmp_path / "exports" / layout for layout in ("ours", "theirs")]
    for out_dir in exports:
        export(tmp_path / out_dir.name, out_dir, name)
    if name == "gguf":
        ours, theirs = (
            {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(out_dir / "model.gguf").tensors}
            for out_dir in exports
        )
        assert ours == theirs
        return
    ours, theirs = (load_file(out_dir / "model.safetensors") for out_dir in exports)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())
    assert len({(out_dir / "config.json").read_text() for out_dir in exports}) == 1


def test_command(tmp_path, capsys):
    config = moe_config(**SOFTMAX)
    model = write_checkpoint(tmp_path / "ours", config)
    (tmp_path / "ours" / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["convert-experts", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    content = yaml.safe_load((tmp_path / "theirs" / "model_config.yaml").read_text())
    assert not any(name.startswith(("_requires", "router_", "mlp_activation")) for name in content)
    converted = GPT(Config.from_file(tmp_path / "theirs" / "model_config.yaml")).eval()
    weights = tmp_path / "theirs" / "lit_model.pth"
    converted.load_state_dict(torch.load(weights))
    ids = torch.randint(0, 64, (1, 9))
    assert torch.allclose(model(ids), converted(ids), atol=1e-4)
    assert weights.stat().st_size < 1.2 * (tmp_path / "ours" / "lit_model.pth").stat().st_size + 20_000
    assert {"tokenizer.json", "chat_template.jinja"} <= {file.name for file in (tmp_path / "theirs").iterdir()}
    assert main(["convert-experts", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 2
    assert "exists" in capsys.readouterr().err


def test_weights_that_lie_expert_by_expert_are_read_as_the_stacked_ones(tmp_path):
    """As LitGPT's converters write them."""
    stacked = write_checkpoint(tmp_path, moe_config(**SOFTMAX)).state_dict()
    torch.save({name: tensor.clone() for name, tensor in unstack_experts(stacked).items()}, tmp_path / "lit_model.pth")
    found = read_source(tmp_path).state
    assert found.keys() == stacked.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stacked.items())


def test_a_malicious_checkpoint_runs_nothing(tmp_path, capsys):
    trace, ours = tmp_path / "ran", tmp_path / "ours"
    write_checkpoint(ours, moe_config(**SOFTMAX))
    weights = torch.load(ours / "lit_model.pth", weights_only=True)
    torch.save({"model": weights, "hparams": Payload(trace)}, ours / "lit_model.pth")
    assert main(["convert-experts", str(ours), str(tmp_path / "theirs")]) == 2
    assert "mkdir" in capsys.readouterr().err
    assert not trace.exists()
    assert not (tmp_path / "theirs").exists()


def test_the_help_is_right_about_recipes():
    """It says that none of the recipes can be converted when it is trained."""
    trained = {"transformer.h.0.mlp.gate.e_score_correction_bias": torch.ones(1)}
    recipes = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert obstacles(load_recipe(recipe).config, trained), recipe.stem
