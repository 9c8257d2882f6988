"""Published models, as their configurations describe them, are models that this package computes."""

import json

import litgpt
import pytest
import torch
import transformers

from litgpt_moe_ext.attention.rope import rope_frequencies
from litgpt_moe_ext.config.features import is_dense_layer
from litgpt_moe_ext.config.litgpt_fields import check_ranges
from litgpt_moe_ext.config.rope import rope_kind
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.facts import facts_of
from litgpt_moe_ext.export.hf.architectures import choose_class
from litgpt_moe_ext.export.hf.published.config import read_published
from litgpt_moe_ext.export.hf.published.names import SYNONYMS
from litgpt_moe_ext.export.hf.published.settings import READERS
from litgpt_moe_ext.meta.models import meta_model
from tests.export.hf.published import PUBLISHED

V2 = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux_tc"}
GPT2 = {"model_type": "gpt2", "vocab_size": 100}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_goes_back_to_the_class_that_it_came_from(tmp_path, name):
    class_name, content = PUBLISHED[name][0], dict(PUBLISHED[name][1])
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = litgpt.Config(**read_published(tmp_path).settings)
    facts = facts_of(config, {})
    architecture, _ = choose_class(facts)
    state = meta_model(config).state_dict()
    rules = architecture.rules(config, state)
    assert all(name in rules or name.endswith("correction_bias") for name in state)
    assert architecture.class_name == class_name
    written = architecture.config(facts)
    # Written in another form, or of layers that there are not.
    unused = ("intermediate_size", "sliding_window") if class_name.startswith("Qwen") else ()
    for key in ("rope_scaling", "tie_word_embeddings", "num_nextn_predict_layers", *unused):
        content.pop(key, None)
    assert {key: written[key] for key in content if key in written} == {
        k: v for k, v in content.items() if k in written
    }


@pytest.mark.parametrize(("step", "only"), [(2, []), (3, [5]), (1, [0, 1]), (1, [2, 0]), (2, [3])])
def test_layers_without_experts_are_qwens(tmp_path, step, only):
    layers = {"num_hidden_layers": 7, "decoder_sparse_step": step, "mlp_only_layers": only}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B-FP8"][1] | layers))
    config = litgpt.Config(**read_published(tmp_path).settings)
    assert [is_dense_layer(config, i) for i in range(7)] == [i in only or (i + 1) % step > 0 for i in range(7)]


YARN_OF_GPT_OSS = {
    "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_seq_len": 4096
}  # fmt: skip


LINEAR = {"rope_type": "linear", "factor": 2.0}
# Where transformers 4 keeps them.
YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("said", "kind", "found"),
    [
        (LINEAR | {"beta_fast": 32.0, "original_max_position_embeddings": 512}, "linear", {"factor": 2.0}),
        (YARN | {"finetuned": True, "low_freq_factor": 1.0}, "yarn", {"original_max_seq_len": 2048}),
        (YARN | {"original_max_position_embeddings": 512, "truncate": None}, "yarn", {"truncate": False}),
    ],
)
def test_positions_are_those_of_transformers(tmp_path, said, kind, found):
    """They read what a kind of scaling has, take the context for the original one, and null for false."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    content = PUBLISHED["llama-68m"][1] | {"rope_scaling": said}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = litgpt.Config(**read_published(tmp_path).settings)
    assert found.items() <= config.rope_adjustments.items()
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](LlamaConfig.from_pretrained(tmp_path), "cpu")
    ours, our_factor = rope_frequencies(config.rope_n_elem, config.rope_base, config.rope_adjustments)
    torch.testing.assert_close(ours, theirs)
    assert our_factor == factor


@pytest.mark.parametrize(
    ("name", "left_out", "said", "found"),
    [
        ("GLM-4.5-Air", "partial_rotary_factor", {}, {"rotary_percentage": 0.5}),
        ("GLM-4.5-Air", "", {"partial_rotary_factor": 0.0}, {"rotary_percentage": 0.0, "rope_n_elem": 0}),
        ("Mixtral-8x7B", "rope_theta", {"sliding_window": 4096}, {"rope_base": 1000000, "sliding_window_size": 4096}),
        ("Mixtral-8x7B", "", {"norm_topk_prob": False}, {"norm_topk_prob": True}),
        ("Qwen1.5-MoE-A2.7B", "", {"qkv_bias": False}, {"attn_bias": False}),
        ("gpt-oss-20b", "", {"layer_types": ["full_attention"] * 24}, {"sliding_window_size": None}),
        ("DeepSeek-V3", "", {"rope_interleave": False}, {"rope_interleave": False}),
        ("llama-68m", "", {}, {"head_size": 64, "n_query_groups": 12}),
        ("OLMoE-1B-7B", "num_key_value_heads", {"num_attention_heads": 8}, {"head_size": 256, "n_query_groups": 8}),
        ("gpt-oss-20b", "rope_scaling", {}, {"rope_adjustments": YARN_OF_GPT_OSS}),
        ("gpt-oss-20b", "", {"rope_scaling": None}, {"rope_adjustments": None}),
        # As transformers 5 saves it.
        ("Qwen3-30B-A3B-FP8", "num_experts", {"num_local_experts": 96}, {"n_expert": 96}),
        ("Qwen3-30B-A3B-FP8", "", {"num_local_experts": 96}, {"n_expert": 128}),
        ("Mixtral-8x7B", "num_local_experts", {"num_experts": 6}, {"n_expert": 6}),
    ],
)
def test_what_an_entry_means(tmp_path, name, left_out, said, found):
    """Also where a file leaves it out, and the class of transformers has a default of its own."""
    content = {key: value for key, value in PUBLISHED[name][1].items() if key != left_out}
    (tmp_path / "config.json").write_text(json.dumps(content | said))
    config = litgpt.Config(**read_published(tmp_path).settings)
    assert {key: getattr(config, key) for key in found} == found


def test_defaults_of_transformers_5(tmp_path, monkeypatch):
    """Its classes know rotary positions under one key."""
    config_class = transformers.CONFIG_MAPPING["gpt_oss"]
    theirs = config_class().to_dict()
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    rope |= {"original_max_position_embeddings": 4096, "rope_theta": 150000.0, "partial_rotary_factor": 1.0}
    theirs = {key: value for key, value in theirs.items() if not key.startswith("rope_")}
    monkeypatch.setattr(config_class, "to_dict", lambda _self: theirs | {"rope_parameters": rope})
    content = PUBLISHED["gpt-oss-20b"][1]
    read = []
    for left_out in ((), ("rope_scaling", "rope_theta")):
        file = json.dumps({key: value for key, value in content.items() if key not in left_out})
        (tmp_path / "config.json").write_text(file)
        read.append(read_published(tmp_path).settings)
    assert read[0] == read[1]
    assert read[0]["rope_base"] == 150000
    assert read[0]["rope_adjustments"]["factor"] == 32.0


class Refusal(Exception):
    """As transformers 5 refuses a value of another type."""


def test_a_size_that_transformers_refuses(tmp_path, monkeypatch):
    config_class = transformers.CONFIG_MAPPING["llama"]

    def strict(**sizes):
        if not isinstance(sizes.get("hidden_size", 1), int):
            raise Refusal
        return config_class(**sizes)

    # By its name, as transformers replaces its own module when it loads a model.
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"llama": strict})
    entries = PUBLISHED["llama-68m"][1] | {"hidden_size": [], "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(SettingsError, match=r"^n_embd: \[\] must be an integer of at least 1"):
        check_ranges(read_published(tmp_path).settings)


def test_a_transformers_that_does_not_load_is_no_fault_of_the_file(tmp_path, monkeypatch):
    class Broken(dict):
        def __getitem__(self, name):
            raise ValueError("numpy.dtype size changed")

    monkeypatch.setattr("transformers.CONFIG_MAPPING", Broken(llama=None))
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llama-68m"][1]))
    with pytest.raises(ValueError, match="^numpy.dtype size changed$"):
        read_published(tmp_path)


def test_every_other_name_of_an_entry_is_known():
    """Of those that the installed transformers takes."""
    for model_type in READERS.keys() - {"litgpt_moe"}:
        # Whichever of two it prefers.
        theirs = {frozenset(names) for names in transformers.CONFIG_MAPPING[model_type].attribute_map.items()}
        assert theirs <= {frozenset(names) for names in SYNONYMS.get(model_type, {}).items()}, model_type


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("llama-68m", {"hidden_act": "gelu"}, "hidden_act: gelu must be silu"),
        ("llama-68m", {"attention_bias": True}, "attention_bias: True and mlp_bias: False must be alike"),
        ("Mixtral-8x7B", {"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type: dynamic must be one of"),
        ("Mixtral-8x7B", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: .* has no factor"),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}, "use_sliding_window: True must be off"),
        ("Qwen3-30B-A3B-FP8", {"attention_bias": True}, "attention_bias: True must be off"),
        (
            "Qwen3-30B-A3B-FP8",
            {"mlp_only_layers": list(range(48))},
            r"mlp_only_layers: \[0, .* leaves no layer with exp",
        ),
        ("Qwen3-30B-A3B-FP8", {"mlp_only_layers": [[1]]}, r"mlp_only_layers: \[\[1\]\] must be a list of layers"),
        ("OLMoE-1B-7B", {"attention_bias": True}, "attention_bias: True must be off"),
        ("ERNIE-4.5-21B-A3B", {"use_bias": True}, "use_bias: True must be off"),
        ("ERNIE-4.5-21B-A3B", {"moe_layer_interval": 2}, "moe_layer_interval and moe_layer_end_index must make all"),
        ("ERNIE-4.5-21B-A3B", {"moe_layer_end_index": 5}, "moe_layer_interval and moe_layer_end_index must make all"),
        ("gpt-oss-20b", {"swiglu_limit": 5.0}, "swiglu_limit: 5.0 must be 7.0"),
        ("gpt-oss-20b", {"attention_bias": False}, "attention_bias: False must be True"),
        ("DeepSeek-V3", {"q_lora_rank": None}, "q_lora_rank: null must be a number"),
        ("DeepSeek-V3", {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 must be 1e-06"),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq: 2 must be 1"),
        ("DeepSeek-V3", V2, "topk_method: noaux_tc must be greedy or group_limited_greedy"),
        ("gpt2", {"activation_function": "silu"}, "activation_function: silu must be gelu_new, gelu or relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True must be off"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False must be True"),
    ],
)
def test_what_this_package_computes_otherwise_is_refused(tmp_path, name, said, message):
    """Though the class of transformers has it: GPT-2s of Stanford's Mistral divide scores by the layer's number."""
    content = GPT2 if name == "gpt2" else PUBLISHED[name][1]
    (tmp_path / "config.json").write_text(json.dumps(content))
    read_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content | said))
    with pytest.raises(SettingsError, match=f"hf_dir: {message}"):
        read_published(tmp_path)


@pytest.mark.parametrize("kind", ["linear", "default"])
def test_a_temperature_without_yarn_is_refused(tmp_path, kind):
    scaling = {"rope_type": kind, "factor": 2.0, "mscale_all_dim": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-V3"][1] | {"rope_scaling": scaling}))
    with pytest.raises(SettingsError, match="rope_scaling.mscale_all_dim: 1.0 needs rope_type: yarn"):
        read_published(tmp_path)


def test_yarn_by_its_factor_alone(tmp_path):
    """As Qwen's model cards have it for long texts."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    content = PUBLISHED["Qwen3-30B-A3B-FP8"][1] | {"rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = litgpt.Config(**read_published(tmp_path).settings)
    assert rope_kind(config.rope_adjustments) == "yarn"
