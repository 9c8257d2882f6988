"""GGUF files hold every tensor and every number of the models that a graph of llama.cpp computes."""

import json
import math

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from litgpt import Config

from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.architecture import choose
from litgpt_moe_ext.export.facts import facts_of
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.export.gguf import spm
from litgpt_moe_ext.export.gguf.architectures import GRAPHS
from litgpt_moe_ext.export.gguf.tokenizer import tokenizer_metadata
from litgpt_moe_ext.export.gguf.write import choose_graph, export_gguf
from litgpt_moe_ext.export.hf.architectures import ARCHITECTURES
from litgpt_moe_ext.export.hf.tokenizer import export_tokenizer
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.training.phases.inputs import open_tokenizer
from tests.export.gguf.models import GRAPH_CASES
from tests.export.gguf.tokenizers import PRE_TOKENIZERS, train_spm
from tests.export.gguf.tokenizers import train_bpe as train_bpe_like
from tests.export.hf.models import CASES, YARN, make_checkpoint
from tests.subsets import soon


def exported(folder, settings, biased, dtype=None, tied=False):
    model = make_checkpoint(folder / "checkpoint", settings, biased, tied)
    export_gguf(folder / "checkpoint", folder / "out", dtype)
    return model, GGUFReader(folder / "out" / "model.gguf")


def keys(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


# One for each kind of graph.
SOON = ("gpt2", "llama-yarn", "mixtral", "qwen2-moe", "ernie", "deepseek-v3", "gpt-oss", "quickstart-without-sinks")


@pytest.mark.parametrize("name", soon(GRAPH_CASES, SOON))
def test_every_tensor_is_in_the_file(tmp_path, name):
    graph_name, settings, biased = GRAPH_CASES[name]
    model, reader = exported(tmp_path, settings, biased)
    assert keys(reader)["general.architecture"] == graph_name
    state, config = model.state_dict(), model.config
    graph, _ = choose(facts_of(config, state), GRAPHS)
    stored = {t.name: torch.tensor(np.array(t.data)).reshape(*t.shape.tolist()[::-1]) for t in reader.tensors}
    for name, expected in graph.constants(config, state).items():
        assert torch.equal(stored.pop(name), expected), name
    for name, rule in graph.rules(config, state).items():
        tensor, expected = rule.back(stored.pop, config.n_expert), state[name]
        if name.endswith("correction_bias") and config.n_expert_groups:
            expected = expected - expected.min().clamp(max=0)
        assert torch.equal(tensor, expected), name
    assert not stored


@pytest.mark.parametrize(
    ("name", "once"),
    [("llama-yarn", True), ("deepseek-v3", True), ("gpt-oss", False), ("qwen2-moe", False), ("olmoe", False)],
)
def test_one_table_is_written_once_where_the_graph_takes_it(tmp_path, name, once):
    """Without `output.weight` the graphs read the embeddings, or refuse the file."""
    model, reader = exported(tmp_path, *GRAPH_CASES[name][1:], tied=True)
    stored = {t.name: np.array(t.data) for t in reader.tensors}
    table = model.lm_head.weight.detach().numpy()
    assert np.array_equal(stored["token_embd.weight"], table)
    assert ("output.weight" not in stored) if once else np.array_equal(stored["output.weight"], table)


def test_documents_are_left_out(tmp_path):
    """Within one of them, attention is the same without."""
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": 0}
    plain = CASES["mixtral"][1] | {"attention_class_name": "SinkAttention", "attention_sinks": False}
    for folder, settings in (("with", plain | documents), ("without", plain)):
        make_checkpoint(tmp_path / folder, settings, False)
    said = [export(tmp_path / folder, tmp_path / f"{folder}-gguf", "gguf") for folder in ("with", "without")]
    assert [len(lines) for lines in said] == [2, 1]
    assert said[0][0].startswith("attention_document_boundary: eos is left out")
    files = [(tmp_path / f"{folder}-gguf" / "model.gguf").read_bytes() for folder in ("with", "without")]
    assert files[0] == files[1]


# What llama.cpp's converter makes of names before it looks them up.
RENAMED = {
    "e_score_correction_bias": ["e_score_correction.bias"],
    "kv_b_proj.weight": ["k_b_proj.weight", "v_b_proj.weight"],
    "self_attn.sinks": ["self_attn.sinks.weight"],
    "experts.gate_up_proj": ["experts.gate_proj.weight", "experts.up_proj.weight"],
    "experts.gate_up_proj_bias": ["experts.gate_proj.bias", "experts.up_proj.bias"],
    "experts.down_proj": ["experts.down_proj.weight"],
    "experts.down_proj_bias": ["experts.down_proj.bias"],
}


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama-yarn", "qwen3", "qwen3-moe", "qwen2-moe", "olmoe", "ernie", "glm", "deepseek-v3", "gpt-oss"],
)
def test_names_are_those_that_gguf_has_for_hugging_faces(name):
    graph_name, settings, _ = GRAPH_CASES[name]
    config = Config(**settings)
    state = meta_model(config).state_dict()
    facts = facts_of(config, {name: tensor for name, tensor in state.items() if not name.endswith("correction_bias")})
    (graph, _), (cls, _) = choose(facts, GRAPHS), choose(facts, ARCHITECTURES)
    architecture = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == graph_name)
    table, theirs = gguf.get_tensor_name_map(architecture, config.n_layer), cls.rules(config, state)
    for ours, stored in graph.rules(config, state).items():
        if ours not in theirs:  # a balancing bias without a choice to make
            continue
        names = [part.replace(".{e}", "") for part in theirs[ours].names]
        for end, instead in RENAMED.items():
            if names[0].endswith(end):
                names = [names[0].removesuffix(end) + other for other in instead]
        assert list(stored.names) == [table.get_name(part, (".weight", ".bias")) for part in names], ours


def test_where_things_are(tmp_path):
    """Not by the rules that wrote the file: experts are stacked, and Llama's heads rotate neighbours."""
    model, reader = exported(tmp_path, *GRAPH_CASES["mixtral"][1:])
    stored = {t.name: np.array(t.data).reshape(t.shape.tolist()[::-1]) for t in reader.tensors}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    experts = state["transformer.h.2.mlp.experts.gate_up_proj"]
    assert np.array_equal(stored["blk.2.ffn_gate_exps.weight"], experts[:, :20])
    assert np.array_equal(stored["blk.2.ffn_up_exps.weight"], experts[:, 20:])
    assert np.array_equal(stored["output.weight"], state["lm_head.weight"])
    qkv, bias = state["transformer.h.1.attn.qkv.weight"], state["transformer.h.1.attn.qkv.bias"]
    for head in range(4):
        for i in range(6):
            for half in range(2):
                ours, theirs = head * 12 + half * 6 + i, head * 12 + 2 * i + half
                assert np.array_equal(stored["blk.1.attn_q.weight"][theirs], qkv[ours])
                assert stored["blk.1.attn_q.bias"][theirs] == bias[ours]
    assert np.array_equal(stored["blk.1.attn_v.weight"], qkv[-24:])


@pytest.mark.parametrize(
    ("name", "neighbours"),
    [
        ("llama-yarn", True),
        ("mixtral", True),
        ("ernie", True),
        ("qwen3", False),
        ("qwen3-moe", False),
        ("qwen2-moe", False),
        ("olmoe", False),
        ("glm", False),
        ("gpt-oss", False),
    ],
)
def test_which_graphs_rotate_neighbours(tmp_path, name, neighbours):
    """As `llama_model_rope_type` of llama.cpp says; the others rotate halves of a head, as we do."""
    model, reader = exported(tmp_path, *GRAPH_CASES[name][1:])
    (stored,) = (t for t in reader.tensors if t.name == "blk.0.attn_k.weight")
    config = model.config
    queries, size = config.n_head * config.head_size, config.head_size
    expected = model.state_dict()["transformer.h.0.attn.qkv.weight"][queries : queries + size]
    if neighbours:
        expected = expected.view(2, size // 2, -1).transpose(0, 1).flatten(0, 1)
    assert np.array_equal(np.array(stored.data).reshape(-1, config.n_embd)[:size], expected.numpy())


def test_latent_attention_rotates_neighbours(tmp_path):
    """The last elements of each query's head, and those of the key that the heads share."""
    model, reader = exported(tmp_path, *GRAPH_CASES["deepseek-v3-half"][1:])
    stored = {t.name: np.array(t.data).reshape(t.shape.tolist()[::-1]) for t in reader.tensors}
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    keys_LD = state["transformer.h.0.attn.kv_a_proj_with_mqa.weight"]
    assert np.array_equal(stored["blk.0.attn_kv_a_mqa.weight"], np.concatenate([keys_LD[:16], keys_LD[16:][order]]))
    heads_HdR = state["transformer.h.0.attn.q_b_proj.weight"].reshape(4, 10 + 8, 20)
    expected = np.concatenate([heads_HdR[:, :10], heads_HdR[:, 10:][:, order]], axis=1)
    assert np.array_equal(stored["blk.0.attn_q_b.weight"].reshape(4, 18, 20), expected)


def test_where_keys_and_values_of_latent_attention_are(tmp_path):
    """Of each head first the part for keys, which is turned round, then that for values."""
    _, settings, biased = GRAPH_CASES["deepseek-v3"]
    model, reader = exported(tmp_path, {**settings, "name": "my-model"}, biased)
    assert keys(reader)["general.name"] == "my-model"
    stored = {t.name: np.array(t.data).reshape(t.shape.tolist()[::-1]) for t in reader.tensors}
    heads_HdR = model.state_dict()["transformer.h.1.attn.kv_b_proj.weight"].view(4, 10 + 14, 16).numpy()
    assert np.array_equal(stored["blk.1.attn_k_b.weight"], heads_HdR[:, :10].transpose(0, 2, 1))
    assert np.array_equal(stored["blk.1.attn_v_b.weight"], heads_HdR[:, 10:])


def test_numbers(tmp_path):
    _, reader = exported(tmp_path, *GRAPH_CASES["glm"][1:])
    found = keys(reader)
    expected = {
        "general.architecture": "glm4moe",
        "general.name": "checkpoint",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
    }
    numbers = {
        "vocab_size": 97,
        "context_length": 96,
        "embedding_length": 48,
        "block_count": 3,
        "feed_forward_length": 192,  # of no layer
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 8,
        "rope.freq_base": 5000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.attn_factor": 1.0,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 20,
        "expert_shared_count": 1,
        "leading_dense_block_count": 0,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.5,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
    }
    expected |= {f"glm4moe.{name}": value for name, value in numbers.items()}
    found["general.name"] = "checkpoint"
    assert found == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in expected.items()}


LOG = math.log(4)
OTHER_NUMBERS = [
    ("gpt2", {"norm_eps": 1e-3}, {"attention.layer_norm_epsilon": 1e-3}),
    ("mixtral", {"intermediate_size": 40}, {"feed_forward_length": 20, "expert_feed_forward_length": 20}),
    ("qwen2-moe", {}, {"expert_shared_feed_forward_length": 28}),
    (
        "ernie",
        {"rope_adjustments": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
        {
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "interleave_moe_layer_step": 1,
            "leading_dense_block_count": 1,
            "feed_forward_length": 40,
            "expert_shared_feed_forward_length": 20,
        },
    ),
    ("gpt-oss", {}, {"attention.sliding_window": 9, "attention.sliding_window_pattern": [True, False, True]}),
    (
        "gpt-oss-without-router-bias",
        {},
        {"attention.sliding_window": 96, "attention.sliding_window_pattern": [True, False, False]},
    ),
    (
        "deepseek-v3",
        {},
        {
            "attention.head_count_kv": 1,
            "attention.key_length": 16 + 8,
            "attention.value_length": 16,
            "attention.key_length_mla": 10 + 8,
            "attention.value_length_mla": 14,
            "attention.q_lora_rank": 20,
            "attention.kv_lora_rank": 16,
            "rope.dimension_count": 8,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            # What `mscale` multiplies cosines and sines by; scores have the square of `mscale_all_dim`'s factor.
            "rope.scaling.attn_factor": (1 + 0.1 * LOG) / (1 + 0.07 * LOG),
            "rope.scaling.yarn_log_multiplier": ((1 + 0.07 * LOG) ** 2 / (1 + 0.1 * LOG) - 1) / LOG,
        },
    ),
    ("glm", {"n_topk_groups": 3}, {"expert_group_count": 4, "expert_group_used_count": 3}),
    ("deepseek-softmax", {}, {"expert_gating_func": 1, "expert_weights_norm": False, "expert_shared_count": 2}),
]


@pytest.mark.parametrize(("name", "change", "numbers"), OTHER_NUMBERS, ids=[name for name, *_ in OTHER_NUMBERS])
def test_numbers_of_other_graphs(name, change, numbers):
    facts = facts_of(Config(**{**GRAPH_CASES[name][1], **change}), {})
    found = choose(facts, GRAPHS)[0].config(facts)
    expected = {key: pytest.approx(value) if isinstance(value, float) else value for key, value in numbers.items()}
    assert {key: found.get(key) for key in numbers} == expected


def test_an_attention_factor_without_a_stretch_is_refused():
    """The graph takes a factor of 1 for no YaRN at all."""
    stretch = {**YARN, "factor": 1.0, "attention_factor": 1.3}
    facts = facts_of(Config(**{**GRAPH_CASES["deepseek-v3"][1], "rope_adjustments": stretch}), {})
    with pytest.raises(SettingsError, match="rope_adjustments.attention_factor: 1.3 needs a factor above 1"):
        choose_graph(facts)
    alike = {**GRAPH_CASES["deepseek-v3"][1], "rope_adjustments": stretch | {"attention_factor": 1.0}}
    facts = facts_of(Config(**alike), {})
    found = choose_graph(facts).config(facts)
    assert (found["rope.scaling.attn_factor"], "rope.scaling.yarn_log_multiplier" in found) == (1.0, False)


@pytest.mark.parametrize(("depth", "vocabulary"), [(26, 97), (27, 97), (48, 128256)])
def test_a_depth_that_means_another_model_is_refused(depth, vocabulary):
    """llama.cpp takes latent attention in so many layers for that of a model without compressed queries."""
    sizes = {"vocab_size": vocabulary, "padded_vocab_size": vocabulary}
    with pytest.raises(SettingsError, match=f"format: gguf: n_layer: {depth} with latent attention is a model without"):
        choose_graph(facts_of(Config(**{**GRAPH_CASES["deepseek-v3"][1], **sizes, "n_layer": depth}), {}))
    for other in ({"n_layer": 28}, {"n_layer": 48, "padded_vocab_size": 97}, {"padded_vocab_size": 128256}):
        choose_graph(facts_of(Config(**{**GRAPH_CASES["deepseek-v3"][1], **other}), {}))


def test_rotations_of_llama3_are_divided():
    """The slowest by the whole factor."""
    config = Config(**GRAPH_CASES["llama-biased-llama3"][1])
    factor_F = choose(facts_of(config, {}), GRAPHS)[0].constants(config, {"": torch.empty(0)})["rope_freqs.weight"]
    assert 1 < factor_F.min() < factor_F.max()
    assert factor_F.max().item() == pytest.approx(8.0)


def test_attention_factor_is_what_multiplies_yarns_own(tmp_path):
    _, reader = exported(tmp_path, *GRAPH_CASES["ernie"][1:])
    factor = keys(reader)["ernie4_5-moe.rope.scaling.attn_factor"]
    assert factor * (0.1 * math.log(4) + 1) == pytest.approx(1.3)


def test_bfloat16(tmp_path):
    model, reader = exported(tmp_path, *CASES["glm"][1:], dtype="bfloat16")
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.ffn_down_exps.weight"] == types["output.weight"] == "BF16"
    assert {types[f"blk.0.{name}"] for name in ("ffn_gate_inp.weight", "exp_probs_b.bias", "attn_norm.weight")} == {
        "F32"
    }
    (tensor,) = (t for t in reader.tensors if t.name == "blk.0.ffn_down_exps.weight")
    assert keys(reader)["general.file_type"] == 32
    others = {
        "gpt2": "position_embd.weight",
        "gpt-oss": "blk.0.ffn_gate_exps.bias",
        "qwen2-moe": "blk.0.ffn_gate_inp_shexp.weight",
    }
    for name, added in others.items():
        _, other = exported(tmp_path / name, *GRAPH_CASES[name][1:], dtype="bfloat16")
        assert next(t for t in other.tensors if t.name == added).tensor_type.name == "F32"
    expected = model.state_dict()["transformer.h.0.mlp.experts.down_proj"].bfloat16().view(torch.int16)
    assert np.array_equal(np.array(tensor.data).view(np.int16).reshape(expected.shape), expected.numpy())


def test_float16(tmp_path):
    model, reader = exported(tmp_path, *CASES["glm"][1:], dtype="float16")
    (tensor,) = (t for t in reader.tensors if t.name == "output.weight")
    assert (keys(reader)["general.file_type"], tensor.tensor_type.name) == (1, "F16")
    assert np.array_equal(np.array(tensor.data), model.lm_head.weight.detach().half().numpy())


class TestTokenizer:
    def export(self, folder, change=lambda raw: None):
        make_checkpoint(
            folder / "checkpoint", {**CASES["llama"][1], "vocab_size": 320, "padded_vocab_size": 320}, False
        )
        train_bpe(["aba abab abb ab " * 20], BPESettings(vocab_size=300), folder / "checkpoint")
        file = folder / "checkpoint" / "tokenizer.json"
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))
        export_gguf(folder / "checkpoint", folder / "out")
        return raw, keys(GGUFReader(folder / "out" / "model.gguf"))

    def test_own_bpe(self, tmp_path):
        raw, found = self.export(tmp_path)
        found = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items() if "ggml" in name}
        assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
        vocabulary = raw["model"]["vocab"]
        assert found["tokens"][: len(vocabulary)] == sorted(vocabulary, key=vocabulary.get)
        assert found["merges"] == [" ".join(pair) for pair in raw["model"]["merges"]]
        assert len(found["merges"]) > 3
        # Special, ordinary, and rows of the embedding that no token has.
        assert found["token_type"] == [3] + [1] * (len(vocabulary) - 1) + [5] * (320 - len(vocabulary))
        assert (found["bos_token_id"], found["eos_token_id"], found["add_bos_token"]) == (0, 0, False)

    def test_merges_as_older_files_have_them(self, tmp_path):
        """A text with a space, not two texts."""

        def older(raw):
            raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]

        raw, found = self.export(tmp_path, older)
        assert found["tokenizer.ggml.merges"] == raw["model"]["merges"]

    def test_tokens_that_users_type_and_a_template_for_chats(self, tmp_path):
        train_bpe(["aba abab abb ab " * 20], BPESettings(vocab_size=300), tmp_path)
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        end, typed = raw["added_tokens"][0], len(raw["model"]["vocab"])
        raw["added_tokens"].append({**end, "id": typed, "content": "<typed>", "special": False})
        del raw["pre_tokenizer"]["use_regex"]  # as in older files
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        found = tokenizer_metadata(tmp_path, 320)
        assert (found["ggml.token_type"][end["id"]], found["ggml.token_type"][typed]) == (3, 4)
        assert (found["ggml.pre"], found["chat_template"]) == ("gpt-2", "{{ messages }}")
        (tmp_path / "chat_template.jinja").unlink()
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        several = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ messages }}"}]
        for template in ("{{ messages }}", several):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
            assert tokenizer_metadata(tmp_path, 320)["chat_template"] == "{{ messages }}"
        for template in (5, [{"name": "default"}, "text"]):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
            assert "chat_template" not in tokenizer_metadata(tmp_path, 320)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(SettingsError, match="names no end of a text, and llama.cpp would take token 11 for it"):
            tokenizer_metadata(tmp_path, 320)
        (tmp_path / "out").mkdir()
        for ends in ([7, 5, 9], [7, 320], [7], 7):
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
            metadata = tokenizer_metadata(tmp_path, 320)
            found = [metadata.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
            known = [7, 5, 9] if ends == [7, 5, 9] else 7
            assert found == (known if known != 7 else [7, None, None])
            assert export_tokenizer(tmp_path, tmp_path / "out", 320) == {"eos_token_id": known, "pad_token_id": 7}

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda raw: raw["model"].update(byte_fallback=True), "BPE with byte_fallback"),
            (lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
            (
                lambda raw: raw.update(
                    pre_tokenizer={
                        "type": "Sequence",
                        "pretokenizers": [{"type": "Digits", "individual_digits": False}, raw["pre_tokenizer"]],
                    }
                ),
                "pre_tokenizer",
            ),
            (lambda raw: raw.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "pre_tokenizer"),
            (lambda raw: raw.update(pre_tokenizer=None), "pre_tokenizer {}"),
            (
                lambda raw: raw.update(model={"type": "WordLevel", "vocab": raw["model"]["vocab"], "unk_token": "a"}),
                "WordLevel",
            ),
            (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
            (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "BPE with end_of_word_suffix"),
            (lambda raw: raw["added_tokens"][0].update(lstrip=True), "takes space or words beside it into account"),
            (
                lambda raw: raw.update(
                    pre_tokenizer={
                        "type": "Sequence",
                        "pretokenizers": [
                            {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Removed", "invert": False},
                            raw["pre_tokenizer"],
                        ],
                    }
                ),
                "pre_tokenizer",
            ),
            (lambda raw: raw["model"]["vocab"].update(beyond=320), "has ids up to 320, but the model only 320"),
        ],
    )
    def test_what_would_split_otherwise_is_refused(self, tmp_path, change, reason):
        with pytest.raises(SettingsError, match=reason):
            self.export(tmp_path, change)
        assert not (tmp_path / "out").exists()


class TestSentencePiece:
    def export(self, folder, **options):
        make_checkpoint(
            folder / "checkpoint", {**CASES["llama"][1], "vocab_size": 400, "padded_vocab_size": 400}, False
        )
        processor = train_spm(folder / "checkpoint", **options)
        export_gguf(folder / "checkpoint", folder / "out")
        return processor, keys(GGUFReader(folder / "out" / "model.gguf"))

    @pytest.mark.parametrize("prefix", [True, False])
    def test_llamas(self, tmp_path, prefix):
        processor, found = self.export(tmp_path, add_dummy_prefix=prefix)
        found = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items() if "ggml" in name}
        size = processor.vocab_size()
        assert (found["model"], found["add_space_prefix"], found["add_bos_token"]) == ("llama", prefix, False)
        assert (found["unknown_token_id"], found["bos_token_id"], found["eos_token_id"]) == (0, 1, 2)
        assert found["tokens"][:size] == [processor.id_to_piece(i) for i in range(size)]
        assert found["scores"] == pytest.approx([processor.get_score(i) for i in range(size)] + [0] * (400 - size))
        assert found["token_type"] == [2, 3, 3] + [6] * 256 + [1] * (size - 259) + [5] * (400 - size)

    @pytest.mark.parametrize("asks", [True, False])
    def test_llama_cpp_puts_before_a_text_what_litgpt_does(self, tmp_path, asks):
        train_spm(tmp_path)
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": asks}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        begins = open_tokenizer(tmp_path, 400).encode("a").tolist()[0] == 1
        found = tokenizer_metadata(tmp_path, 400)
        assert found["ggml.add_bos_token"] == begins == asks
        assert not found["ggml.add_eos_token"]

    def test_a_model_without_a_token_for_the_end_or_the_beginning(self, tmp_path):
        """SentencePiece says -1 for it."""
        _, found = self.export(tmp_path, bos_id=-1)
        ends = [found[f"tokenizer.ggml.{name}"] for name in ("bos_token_id", "eos_token_id", "add_bos_token")]
        assert ends == [2, 2, False]
        train_spm(tmp_path / "checkpoint", eos_id=-1)
        with pytest.raises(SettingsError, match="names no end of a text"):
            tokenizer_metadata(tmp_path / "checkpoint", 400)
        with pytest.raises(SettingsError, match="has no end-of-text token"):
            open_tokenizer(tmp_path / "checkpoint", 400)
        assert export_tokenizer(tmp_path / "checkpoint", tmp_path, 400) == {"bos_token_id": 1}

    def test_spaces_that_stay_spaces_are_refused(self, tmp_path):
        from sentencepiece import sentencepiece_model_pb2

        train_spm(tmp_path)
        model = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "tokenizer.model").read_bytes())
        model.normalizer_spec.escape_whitespaces = False
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        with pytest.raises(SettingsError, match="without escape_whitespaces"):
            spm.read(tmp_path, 400)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"model_type": "unigram", "hard_vocab_limit": False}, "not BPE"),
            ({"normalization_rule_name": "nfkc"}, "normalization nfkc"),
            ({"treat_whitespace_as_suffix": True}, "spaces as suffixes"),
            (
                {"remove_extra_whitespaces": True, "byte_fallback": False, "vocab_size": 200},
                "without byte_fallback, remove_extra_white",
            ),
            ({"user_defined_symbols": ["<tool>"]}, "user-defined or unused pieces"),
        ],
    )
    def test_what_would_split_otherwise_is_refused(self, tmp_path, options, reason):
        with pytest.raises(SettingsError, match=rf"tokenizer.model in .* \({reason}.*must be a BPE with"):
            self.export(tmp_path, **options)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers(tmp_path, name):
    tokenizer = train_bpe_like(tmp_path, name, 320)
    metadata = tokenizer_metadata(tmp_path, 320)
    assert metadata["ggml.pre"] == name
    assert metadata["ggml.tokens"] == [tokenizer.id_to_token(i) for i in range(320)]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gpt2", {"mlp_activation": "relu", "gelu_approximate": "none"}, "gpt2 has no activation: relu"),
        ("gpt2", {"gelu_approximate": "none"}, "gpt2 has no activation: gelu"),
        ("glm", {"attention_sinks": True}, "glm4moe has no sinks: all"),
        (
            "llama-yarn",
            {"rope_adjustments": {**CASES["llama"][1]["rope_adjustments"], "truncate": False}},
            "yarn_rounds",
        ),
        ("olmoe", {"norm_topk_prob": True}, "olmoe has no norm_topk: true"),
        ("qwen3-moe", {"decoder_sparse_step": 2, "intermediate_size": 40}, "qwen3moe has no layers: alternating"),
        ("mixtral", {"sliding_window_size": 8, "sliding_window_indices": [1, 1, 1]}, "with experts has no window: all"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, name, change, reason):
    make_checkpoint(tmp_path / "checkpoint", {**GRAPH_CASES[name][1], **change}, False)
    with pytest.raises(SettingsError, match=f"no graph of llama.cpp computes this model .*{reason}"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "out")


def test_a_balancing_bias_is_not_dropped(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", {**GRAPH_CASES["mixtral"][1], "router_bias_update_rate": 0.01}, True)
    with pytest.raises(SettingsError, match="with experts has no balancing_bias: true"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "out")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install gguf"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "out")
