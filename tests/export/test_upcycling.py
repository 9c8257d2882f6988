"""An upcycled model computes what the dense model computes, whatever its routers say."""

import re

import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.utils import save_config

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.export.upcycling import require_same_function, upcycle, upcycled_weights
from tests.models import initialized_model

F = 24
SHAPE = {
    "name": "tiny",
    "block_size": 32,
    "n_layer": 3,
    "n_embd": 16,
    "n_head": 4,
    "vocab_size": 64,
    "padded_vocab_size": 64,
    "norm_class_name": "RMSNorm",
    "bias": False,
    "parallel_residual": False,
}


SHARED = {"moe_intermediate_size": F // 3, "n_shared_expert": 1}


def dense_config(**changes) -> Config:
    return Config(**{**SHAPE, "mlp_class_name": "LLaMAMLP", "intermediate_size": F, **changes})


def moe_config(**changes) -> Config:
    settings = {
        "mlp_class_name": "SharedExpertMoE",
        "n_expert": 8,
        "n_expert_per_token": 2,
        "moe_intermediate_size": F,
        "norm_topk_prob": True,
    }
    return Config(**{**SHAPE, **settings, **changes})


def dense_model(config: Config) -> GPT:
    model = initialized_model(config).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def upcycled_model(dense: GPT, config: Config) -> GPT:
    model = GPT(config).double()
    model.load_state_dict(dict(upcycled_weights(dense.state_dict(), dense.config, config, seed=1)))
    return model


def assert_same_function(dense: GPT, moe: GPT, tolerance: float = 1e-10) -> None:
    ids = torch.randint(0, 64, (2, 17))
    for training in (True, False):
        dense.train(training)
        moe.train(training)
        torch.testing.assert_close(moe(ids), dense(ids), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_score_function": "softmax"},
        {"routed_scaling_factor": 2.5},
        {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1},
        {"router_score_function": "softmax", "norm_topk_prob": False, "n_expert_per_token": 8},
        {"router_type": "hash", "norm_topk_prob": False},
        {"router_bias_update_schedule": {"warmup_steps": 3}},
        {"first_k_dense_replace": 1, "intermediate_size": F},
        {"decoder_sparse_step": 3, "intermediate_size": F},
        {"mlp_class_name": "NoisyTopKMoE", "norm_topk_prob": False},
        # Slices of the dense MLP: two copies of four experts each, and with groups of one copy.
        {"moe_intermediate_size": F // 4, "n_expert_per_token": 4},
        {"moe_intermediate_size": F // 2, "n_expert_per_token": 4, "routed_scaling_factor": 2.0},
        {
            "moe_intermediate_size": F // 2,
            "n_expert_per_token": 2,
            "n_expert_groups": 4,
            "n_topk_groups": 2,
            "n_topk_scores_per_group": 2,
        },
        # Shared experts take a third of the hidden units, or half.
        {"moe_intermediate_size": F // 3, "n_shared_expert": 1, "n_expert_per_token": 2},
        {"moe_intermediate_size": F // 2, "n_shared_expert": 1, "shared_expert_gate": True},
    ],
    ids=str,
)
def test_same_function(changes):
    dense = dense_model(dense_config())
    moe = upcycled_model(dense, moe_config(**changes))
    assert_same_function(dense, moe)


def test_the_seed_decides_about_routers():
    dense, gate = dense_model(dense_config()), "transformer.h.0.mlp.gate.weight"
    first, again, other = (
        dict(upcycled_weights(dense.state_dict(), dense.config, moe_config(), seed=seed))[gate] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx((0.4 / dense.config.n_embd) ** 0.5, rel=0.2)  # as of any router


@pytest.mark.parametrize(
    ("dense_class", "activation"), [("GptNeoxMLP", "gelu"), ("GemmaMLP", "geglu"), ("FeedForward", "relu2")]
)
@pytest.mark.parametrize("shared", [{}, SHARED, {**SHARED, "shared_expert_gate": True}], ids=["", "shared", "gated"])
def test_activations_and_biases(dense_class, activation, shared):
    extra = {"mlp_activation": activation} if dense_class == "FeedForward" else {}
    dense = dense_model(dense_config(mlp_class_name=dense_class, bias=True, gelu_approximate="none", **extra))
    moe = upcycled_model(dense, moe_config(mlp_activation=activation, bias=True, routed_scaling_factor=1.5, **shared))
    assert_same_function(dense, moe)


def test_routers_differ():
    """Tokens go to different experts, which the same function would hide."""
    model = upcycled_model(dense_model(dense_config()), moe_config())
    weight_ED = model.transformer.h[0].mlp.gate.weight
    assert torch.linalg.matrix_rank(weight_ED) == 8
    assert not torch.equal(weight_ED, model.transformer.h[1].mlp.gate.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob: False does not make the gate values"),
        ({"norm_topk_prob": False, "n_expert_per_token": 8}, "norm_topk_prob: False does not make the gate values"),
        (
            {"norm_topk_prob": False, "router_score_function": "softmax"},
            "norm_topk_prob: False does not make the gate values",
        ),
        ({"moe_intermediate_size": 10}, "moe_intermediate_size: 10 must divide the 24 hidden units"),
        ({"n_shared_expert": 1}, "must divide the 0 hidden units left for"),
        ({"moe_intermediate_size": F // 2, "n_expert_per_token": 3}, "n_expert_per_token: 3 must be a multiple of 2"),
        ({"moe_intermediate_size": F // 2, "n_expert": 9}, "n_expert: 9 must be a multiple of 2"),
        (
            {"moe_intermediate_size": F // 2, "mlp_class_name": "NoisyTopKMoE", "norm_topk_prob": False},
            "this router would not choose them together",
        ),
        (
            {
                "moe_intermediate_size": F // 4,
                "n_expert_per_token": 4,
                "n_expert_groups": 4,
                "n_topk_groups": 2,
                "n_topk_scores_per_group": 1,
            },
            "n_expert_groups: 4 groups cut copies apart",
        ),
        ({"n_embd": 32}, "n_embd: 32 must be 16 as in the dense model"),
        ({"mlp_activation": "geglu"}, "mlp_activation: 'geglu' must be 'swiglu'"),
        (
            {"first_k_dense_replace": 1, "intermediate_size": 20},
            "intermediate_size: 20 must be 24 as in the dense model",
        ),
        ({"expert_gate_on_input": True}, "expert_gate_on_input: True divides what copies of the dense MLP get"),
    ],
    ids=str,
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        require_same_function(dense_config(), moe_config(**changes))


def test_a_name_that_makes_other_norms():
    """LitGPT's norms add 1 to their weights in a model called Gemma."""
    dense = dense_model(dense_config(name="Gemma-tiny"))
    assert_same_function(dense, upcycled_model(dense, moe_config(name="a Gemma of experts")))
    with pytest.raises(ValueError, match="name: 'tiny' must be with 'Gemma' as in the dense model, 'Gemma-tiny'"):
        upcycled_model(dense, moe_config())
    with pytest.raises(ValueError, match="name: 'Gemma' must be without 'Gemma' as in the dense model, 'tiny'"):
        upcycled_model(dense_model(dense_config()), moe_config(name="Gemma"))


def test_not_dense():
    with pytest.raises(ValueError, match="its mlp_class_name is 'SharedExpertMoE', which is not a dense MLP"):
        require_same_function(moe_config(), moe_config())


@pytest.fixture
def dense_dir(tmp_path):
    directory = tmp_path / "dense"
    directory.mkdir()
    model = initialized_model(dense_config())
    torch.save(model.state_dict(), directory / "lit_model.pth")
    save_config(model.config, directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def test_command(dense_dir, tmp_path, capsys):
    """Writes a checkpoint directory that LitGPT's model loads; nothing is overwritten, and mistakes are named."""
    recipe = tmp_path / "recipe.yaml"
    settings = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": F, "norm_topk_prob": True}
    model_config = {**SHAPE, "mlp_class_name": "SharedExpertMoE", **settings}
    recipe.write_text(yaml.safe_dump({"model_config": model_config}))
    out_dir = tmp_path / "moe"
    assert main(["upcycle", str(dense_dir), str(recipe), str(out_dir)]) == 0
    names = ["chat_template.jinja", "lit_model.pth", "model_config.yaml", "tokenizer.json"]
    assert sorted(path.name for path in out_dir.iterdir()) == names
    config = Config.from_file(out_dir / "model_config.yaml")
    models = []
    for directory, its_config in ((dense_dir, dense_config()), (out_dir, config)):
        models.append(GPT(its_config))
        models[-1].load_state_dict(torch.load(directory / "lit_model.pth", weights_only=True))
    assert_same_function(*models, tolerance=1e-5)
    for arguments, message in (
        ((dense_dir, recipe, out_dir), "exists; name"),
        ((tmp_path, recipe, tmp_path / "new"), "dense_dir: .* has no model_config.yaml"),
        ((dense_dir, dense_dir / "config.json", tmp_path / "new"), "model_config: null must be a model"),
    ):
        assert main(["upcycle", *map(str, arguments)]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_missing_weights(dense_dir, tmp_path):
    weights = torch.load(dense_dir / "lit_model.pth", weights_only=True)
    del weights["lm_head.weight"]
    torch.save({"model": weights}, dense_dir / "lit_model.pth")
    with pytest.raises(ValueError, match=r"dense_dir: its weights are not .*: missing \['lm_head.weight'\]"):
        upcycle(dense_dir, tmp_path / "moe", moe_config())
    assert not (tmp_path / "moe").exists()
