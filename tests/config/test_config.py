"""Every wrong setting is refused when the configuration is made, with the field, the value and the remedy."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from litgpt import Config
from litgpt.model import GPT, LLaMAMLP

from litgpt_moe_ext.config.notes import model_notes
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.moe.layer import FeedForward, MoE, NoisyTopKMoE, SharedExpertMoE
from tests.models import attention_config, dense_config, initialized_model, moe_config, noisy_config, randomize

GROUPS = {"n_expert_groups": 4, "n_topk_groups": 1, "n_topk_scores_per_group": 2}
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
NO_LOSSES = {"router_importance_loss_coef": 0.0, "router_load_loss_coef": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_expert": 0}, "n_expert: 0 must be an integer from 1 to 100000"),
        ({"n_expert": 10**9}, "n_expert: 1000000000 must be an integer from 1 to 100000"),
        ({"n_expert": True}, "n_expert: True must be an integer"),
        ({"n_expert_per_token": 0}, "n_expert_per_token: 0 must be an integer from 1 to 8"),
        ({"n_expert_per_token": 9}, "n_expert_per_token: 9 must be an integer from 1 to 8"),
        ({"n_shared_expert": -1}, "n_shared_expert: -1 must be an integer of at least 0"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size: null must be set"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: 0 must be an integer of at least 1"),
        ({**GROUPS, "n_expert_groups": 3}, r"n_expert_groups: 3 must divide n_expert: 8; choose one of \[2, 4, 8\]"),
        (
            {**GROUPS, "n_expert": 1, "n_expert_per_token": 1, "n_expert_groups": 2},
            "n_expert_groups: 2 must divide n_expert: 1; remove it, or raise n_expert",
        ),
        ({**GROUPS, "n_expert_groups": 1}, "n_expert_groups: 1 must be an integer of at least 2"),
        ({**GROUPS, "n_topk_groups": None}, "n_topk_groups: null must be an integer from 1 to 4"),
        ({**GROUPS, "n_topk_groups": 5}, "n_topk_groups: 5 must be an integer from 1 to 4"),
        ({**GROUPS, "n_topk_scores_per_group": 3}, "n_topk_scores_per_group: 3 must be an integer from 1 to 2"),
        ({**GROUPS, "n_topk_scores_per_group": None}, "n_topk_scores_per_group: null must be"),
        (
            {**GROUPS, "n_expert_per_token": 3},
            "n_expert_per_token: 3 is more than the 1 chosen groups of 2 experts hold; use at most 2",
        ),
        ({"n_topk_groups": 2}, "n_topk_groups: 2 would be ignored because n_expert_groups is not set"),
        (
            {"router_score_function": "relu"},
            "router_score_function: 'relu' is unknown; choose from sigmoid, softmax; leave",
        ),
        ({"router_bias_update_rate": -0.1}, "router_bias_update_rate: -0.1 must be a number of at least 0"),
        ({"router_bias_update_rate": float("nan")}, "router_bias_update_rate: nan must be"),
        (
            {"gelu_approximate": "tanh"},
            "gelu_approximate: 'tanh' would be ignored because mlp_activation is swiglu",
        ),
        ({"router_load_loss_coef": 0.1}, "router_load_loss_coef: 0.1 would be ignored"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace: 3 must be an integer from 0 to 2"),
        ({"first_k_dense_replace": 1}, "intermediate_size: null must be set because first_k_dense_replace is 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0 must be an integer from 1 to 2"),
        ({"decoder_sparse_step": 2}, "intermediate_size: null must be set because decoder_sparse_step is 2"),
        (
            {"mlp_activation": "silu"},
            "mlp_activation: 'silu' is unknown; choose from swiglu, clamped_swiglu",
        ),
        (
            {"expert_backend": "fast"},
            "expert_backend: 'fast' is unknown; choose from loop, grouped_cpu, grouped_mm, tri",
        ),
        ({"expert_dropout": 1.0}, "expert_dropout: 1.0 must be a number of at least 0 and below 1"),
        ({"residual_dropout": -0.1}, "residual_dropout: -0.1 must be a number of at least 0 and below 1"),
        (
            {"residual_dropout": 0.1, "post_mlp_norm": True},
            "residual_dropout: 0.1 cannot be combined with post_mlp_norm",
        ),
        ({"shared_expert_gate": True}, "shared_expert_gate: True would be ignored because n_shared_expert is not set"),
        (
            {"n_shared_expert": 1, "shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size: 0 must be an integer of at least 1",
        ),
        (
            {"router_type": "random"},
            "router_type: 'random' is unknown; choose from topk, noisy_topk, hash, uniform; if an extension adds it, ",
        ),
        (
            {"router_type": "hash", "router_z_loss_coef": 0.1},
            "router_z_loss_coef: 0.1 would be ignored because router_type",
        ),
        ({"router_type": "hash", "norm_topk_prob": True}, "norm_topk_prob: True would be ignored because router_type"),
        ({"router_jitter_noise": 1.5}, "router_jitter_noise: 1.5 must be a number of at least 0 and below 1"),
        ({"router_z_loss_coef": -1}, "router_z_loss_coef: -1 must be a number of at least 0"),
        (
            {"router_bias_update_schedule": {"warmup": 3}},
            "with keys among warmup_steps, decay_start, decay_steps",
        ),
        ({"router_bias_update_schedule": {"decay_steps": 3}}, "decay_steps: 3 needs decay_start"),
        ({"router_bias_update_schedule": {"warmup_steps": 1.5}}, "warmup_steps: 1.5 must be an integer"),
        (
            {"router_bias_update_rate": 0, "router_bias_update_schedule": {"warmup_steps": 3}},
            "would be ignored because router_bias_update_rate is 0",
        ),
        (
            {"mlp_class_name": "FeedForward"},
            "n_expert: 8 would be ignored because mlp_class_name: FeedForward is a dense",
        ),
        (
            {"n_layer": 3, "mlp_only_layers": [0, 0]},
            "mlp_only_layers: .0, 0. must be a list of different integers from 0 to 2",
        ),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers: .-1. must be a list of different integers from 0 to 1"),
        ({"mlp_only_layers": [0, 1]}, "not all of them"),
        (
            {"n_layer": 1, "mlp_only_layers": [0]},
            "mlp_only_layers: .0. leaves no MoE layer, since n_layer is 1; remove",
        ),
        ({"mlp_only_layers": [0]}, "intermediate_size: null must be set because mlp_only_layers is .0."),
        ({"latent_attention": dict.fromkeys(LATENT, 4), "rope_base": 1}, "rope_base: 1 must be a number above 1"),
        ({"clip_qkv": 8.0}, "clip_qkv: 8.0 would be ignored because attention_class_name is not set"),
        ({"router_type": "hash", "router_bias": True}, "router_bias: True would be ignored because router_type: hash"),
        ({"attention_sinks": True}, "attention_sinks: True would be ignored because attention_class_name is not set"),
        ({"rope_indices": [0, 1]}, ".0, 1. needs rope_local_base_freq; add it"),
        ({"sliding_window_indices": [0, 1]}, ".0, 1. needs sliding_window_size; add it"),
        ({"shared_attention_norm": True}, "shared_attention_norm: True needs parallel_residual: true"),
        ({"attention_class_name": "Sink"}, "attention_class_name: 'Sink' is unknown; choose from SinkAttention"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_config(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"router_bias_update_rate": 0.001}, "router_bias_update_rate: 0.001"),
        ({"router_score_function": "softmax"}, "router_score_function: 'softmax'"),
        (GROUPS, "n_expert_groups: 4"),
        ({"norm_topk_prob": True}, "norm_topk_prob: True"),
        ({"n_expert_per_token": 9}, "n_expert_per_token: 9"),
        ({"router_load_loss_coef": -1}, "router_load_loss_coef: -1"),
    ],
    ids=str,
)
def test_refused_by_the_noisy_router(changes, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        noisy_config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd: 30, n_head: 4 must fulfil n_embd % n_head == 0"),
        ({"n_expert": 8, "n_expert_groups": 3}, "n_expert: 8, n_expert_groups: 3 must fulfil n_expert % n_expert_g"),
        ({"latent_attention": {"q_lora_rank": 4}}, "q_lora_rank: 4, kv_lora_rank: None, qk_rope_head_dim: None"),
        (
            {"latent_attention": dict.fromkeys(LATENT, 4), "n_head": 4, "n_query_groups": 2},
            "n_head: 4, n_query_groups: 2 must fulfil n_head == n_query_groups",
        ),
    ],
    ids=str,
)
def test_what_litgpt_asserts_of_its_own_models_is_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Config(**fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["LLaMAMLP", "LLaMAMoE", "GptNeoxMLP"])
@pytest.mark.parametrize("field", [{"router_score_function": "sigmoid"}, {"router_bias_update_rate": 0.1}])
def test_other_classes_refuse_router_settings(name, field):
    with pytest.raises(ValueError, match=f"would be ignored because mlp_class_name: {name} has no such setting"):
        moe_config(mlp_class_name=name, intermediate_size=16, **field)


def test_unknown_class_is_named():
    with pytest.raises(ValueError, match="mlp_class_name: 'SharedExprtMoE' is unknown; choose from .*SharedExpertMoE"):
        moe_config(mlp_class_name="SharedExprtMoE")


def test_defaults_of_the_classes():
    config = moe_config()
    assert (config.router_score_function, config.router_bias_update_rate) == ("sigmoid", 0.001)
    config = noisy_config()
    assert (config.router_score_function, config.router_bias_update_rate) == (None, None)
    assert (config.router_importance_loss_coef, config.router_load_loss_coef) == (0.1, 0.1)
    assert moe_config(moe_intermediate_size=None, intermediate_size=20).moe_intermediate_size == 20


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob: true"),
        ({"router_type": "noisy_topk", **NO_LOSSES}, "router_type: noisy_topk"),
        ({}, None),
        ({"norm_topk_prob": True, "n_expert_per_token": 2}, None),
    ],
)
def test_routers_that_the_loss_does_not_teach(changes, setting):
    """A model's settings tell whether its gate gets a gradient."""
    config = moe_config(mlp_class_name="MoE", **{"n_expert_per_token": 1, **changes})
    layer = randomize(MoE(config)).double()
    layer(torch.randn(1, 5, 16, dtype=torch.float64)).square().sum().backward()
    assert (layer.gate.weight.grad.abs().max() < 1e-9) == (setting is not None)
    notes = model_notes(config)
    assert len(notes) == (setting is not None)
    assert all(f"n_expert_per_token: 1 with {setting} makes every gate" in note for note in notes)


@pytest.mark.parametrize("name", ["LLaMAMLP", "GemmaMLP", "GptNeoxMLP"])
def test_experts_that_a_dense_class_of_litgpt_does_not_have(name):
    """LitGPT itself accepts most of the fields and ignores them."""
    experts = {"n_expert": 4, "n_expert_per_token": 2, "routed_scaling_factor": 2.5}
    dense = {"mlp_class_name": name, "intermediate_size": 16}
    (note,) = model_notes(Config(**dense, **experts))
    assert note.startswith(f"mlp_class_name: {name} is a dense layer, without effect are n_expert: 4, n_expert_per_to")
    assert note.endswith("routed_scaling_factor: 2.5")
    for config in (Config(**dense), Config.from_name("Mixtral-8x7B-v0.1"), moe_config()):
        assert model_notes(config) == []
    with pytest.raises(
        SettingsError, match=f"first_k_dense_replace: 1 would be ignored because mlp_class_name: {name}"
    ):
        Config(**dense, first_k_dense_replace=1)


def test_experts_that_no_layer_has():
    """Because of settings of which each alone leaves an MoE layer."""
    dense = {"intermediate_size": 16, "first_k_dense_replace": 1}
    assert model_notes(moe_config(**dense, decoder_sparse_step=1)) == []
    (note,) = model_notes(moe_config(**dense, decoder_sparse_step=2))
    assert note == (
        "mlp_class_name: SharedExpertMoE makes no MoE layer here, all are dense (n_layer: 2, first_k_dense_replace: 1, "
        "decoder_sparse_step: 2)"
    )


def test_classes_are_found_by_name():
    assert moe_config().mlp_class is SharedExpertMoE
    assert noisy_config().mlp_class is NoisyTopKMoE


@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_leading_dense_layers(make):
    model = GPT(make(first_k_dense_replace=1, intermediate_size=24))
    assert isinstance(model.transformer.h[0].mlp, LLaMAMLP)
    assert model.transformer.h[0].mlp.fc_1.out_features == 24
    assert isinstance(model.transformer.h[1].mlp, (SharedExpertMoE, NoisyTopKMoE))


def test_subclasses_know_the_fields():
    from litgpt.lora import Config as LoraConfig

    assert LoraConfig(**vars_of(moe_config(router_bias_update_rate=0.5)), lora_r=4).router_bias_update_rate == 0.5


def vars_of(config: Config) -> dict:
    from dataclasses import fields

    return {field.name: getattr(config, field.name) for field in fields(config)}


@pytest.mark.parametrize("module", ["lora", "adapter", "adapter_v2"])
def test_other_finetuning_methods_cannot_take_the_attention_either(module):
    """The command line makes one line of it."""
    finetuning = importlib.import_module(f"litgpt.{module}")
    dense = moe_config(mlp_class_name="LLaMAMLP", intermediate_size=8, attention_class_name="SinkAttention")
    with pytest.raises(SettingsError, match=f"'SinkAttention' cannot be combined with litgpt.{module}.*finetune_full"):
        finetuning.GPT(finetuning.Config(**vars_of(dense)))


def test_adapters_cannot_take_latent_attention():
    """They would put LitGPT's ordinary attention in its place, with random weights."""
    from litgpt import adapter

    latent = moe_config(latent_attention=dict.fromkeys(LATENT, 4), n_head=4, n_query_groups=4)
    with pytest.raises(SettingsError, match="^latent_attention cannot be combined with litgpt.adapter.*finetune_full"):
        adapter.GPT(adapter.Config(**vars_of(latent)))


@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_parameter_counts_by_hand(make):
    config = make(n_shared_expert=1, first_k_dense_replace=1, intermediate_size=24)
    embeddings = 2 * 64 * 16
    attention = 16 * (16 + 8 + 8) + 16 * 16
    norms = 2 * 16
    expert, dense = 3 * 16 * 12, 3 * 16 * 24
    router = 8 * 16 * (2 if make is noisy_config else 1)
    common = embeddings + 2 * (attention + norms) + 16 + dense + router + expert
    assert count_parameters(config) == (common + 8 * expert, common + 2 * expert)


def test_parameter_counts_of_litgpts_classes():
    dense = moe_config(mlp_class_name="LLaMAMLP", intermediate_size=8)
    assert count_parameters(dense).total == count_parameters(dense).active
    routed = moe_config(mlp_class_name="LLaMAMoE")
    assert count_parameters(routed).total - count_parameters(routed).active == 2 * 6 * 3 * 16 * 12


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 3, "first_k_dense_replace": 1}, [0, 1, 2]),
        ({}, []),
    ],
    ids=str,
)
def test_every_nth_layer_is_an_moe_layer(settings, dense):
    model = GPT(moe_config(n_layer=4, intermediate_size=24, mlp_activation="relu", **settings))
    assert [i for i, block in enumerate(model.transformer.h) if isinstance(block.mlp, FeedForward)] == dense
    for i in dense:
        assert model.transformer.h[i].mlp.fc.out_features == 24


def test_dense_layers_are_initialised_like_the_others():
    """Their output projection falls with the depth, as that of LitGPT's own class."""
    config = moe_config(n_embd=64, n_layer=4, intermediate_size=96, decoder_sparse_step=2, mlp_activation="relu2")
    model = initialized_model(config)
    mlp = model.transformer.h[0].mlp
    assert mlp.fc.weight.std().item() == pytest.approx((2 / 5 / 64) ** 0.5, rel=0.1)
    assert mlp.proj.weight.std().item() == pytest.approx(1 / 8 / 4, rel=0.1)


def test_a_dense_twin_of_any_activation():
    model = initialized_model(dense_config(mlp_class_name="FeedForward", mlp_activation="relu"))
    ids = torch.randint(0, 64, (2, 9))
    mlp = model.transformer.h[0].mlp
    x = torch.randn(3, 16)
    torch.testing.assert_close(mlp(x), mlp.proj(torch.relu(mlp.fc(x))))
    assert model(ids).shape == (2, 9, 64)


def test_residual_dropout_is_on_both_branches_in_training_only():
    model = initialized_model(moe_config(residual_dropout=0.5))
    plain = initialized_model(moe_config())
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (2, 9))
    assert not torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model.eval()(ids), plain.eval()(ids))
    block = model.transformer.h[0].train()
    for name in ("attn", "mlp"):
        seen = []
        handle = getattr(block, f"post_{'attention' if name == 'attn' else 'mlp'}_norm").register_forward_hook(
            lambda _module, args, output, seen=seen: seen.append((args[0], output))
        )
        model(ids)
        handle.remove()
        before, after = seen[0]
        kept = after != 0
        torch.testing.assert_close(after[kept], 2 * before[kept])
        assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("module", ["lora", "adapter_v2"])
@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_other_finetuning_methods_say_that_they_cannot(make, module):
    finetuning = importlib.import_module(f"litgpt.{module}")
    config = finetuning.Config(**vars_of(make()))
    name = make().mlp_class_name
    with pytest.raises(ValueError, match=f"{name} cannot be finetuned with litgpt.{module}.*litgpt finetune_full"):
        finetuning.GPT(config)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (moe_config(), "mlp_class_name: SharedExpertMoE"),
        (attention_config(mlp_class_name="FeedForward", mlp_activation="relu"), "mlp_activation: relu"),
        (attention_config(), "attention_sinks: True"),
        (attention_config(attention_sinks=False), None),
        (attention_config(attention_sinks=False, mlp_class_name="GptNeoxMLP"), None),
        (attention_config(attention_sinks=False, mlp_class_name="FeedForward"), None),
    ],
)
def test_tensor_parallelism_says_what_it_cannot_divide(config, what):
    from litgpt.generate.tp import tensor_parallel

    fabric = SimpleNamespace(world_size=2, global_rank=1)
    if what is not None:
        with pytest.raises(ValueError, match=f"{what} cannot be divided .* litgpt generate"):
            tensor_parallel(fabric, GPT(config))
    else:
        assert tensor_parallel(fabric, GPT(config)).config.n_head == config.n_head


def test_conversion_says_that_it_cannot(tmp_path):
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
    from litgpt.utils import save_config

    save_config(moe_config(), tmp_path)
    with pytest.raises(ValueError, match="holds a model with layers of litgpt_moe_ext"):
        convert_lit_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_saved_model_names_no_backend(tmp_path):
    """Weights that a GPU's kernel trained run on a CPU, and without the extension that brought it."""
    from litgpt.utils import save_config

    forced = moe_config(attention_class_name="SinkAttention", attention_backend="cudnn", expert_backend="triton")
    save_config(forced, tmp_path)
    assert "backend" not in (tmp_path / "model_config.yaml").read_text()
    free = Config.from_file(tmp_path / "model_config.yaml")
    assert (free.attention_backend, free.expert_backend) == (None, None)
    assert (forced.attention_backend, forced.expert_backend) == ("cudnn", "triton")
    free.attention_backend, free.expert_backend = "cudnn", "triton"
    assert free == forced
