"""Exported models compute what the originals compute."""

import json
import logging
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.shards import write_shards
from litgpt_moe_ext.export.hf.tokenizer import _in_words_of_both
from litgpt_moe_ext.export.hf.write import export_checkpoint
from litgpt_moe_ext.export.source import read_source
from tests.export.hf.models import CASES, SOON, make_checkpoint
from tests.subsets import soon


@pytest.mark.parametrize("name", soon(CASES, SOON))
def test_logits_and_tokens_equal_the_originals(tmp_path, name):
    class_name, settings, biased = CASES[name]
    model = make_checkpoint(tmp_path / "checkpoint", settings, biased)
    done = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert done.class_name == class_name, done.lines
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(theirs).__name__ == class_name
    tokens = torch.randint(settings["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        written = theirs.generate(tokens[:1, :8], max_new_tokens=24, do_sample=False, eos_token_id=None)
        text = tokens[:1, :8]
        for _ in range(24):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == text.tolist()


@pytest.mark.parametrize(("name", "once"), [("gpt2", True), ("mixtral", True), ("quickstart", True), ("glm", False)])
def test_one_table_is_written_once_where_the_class_takes_it(tmp_path, name, once):
    _, settings, biased = CASES[name]
    model = make_checkpoint(tmp_path / "checkpoint", settings, biased, tied=True)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not once)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == once
    assert ("is the table of embeddings |" in (tmp_path / "out" / "README.md").read_text()) == once
    theirs, facts = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(facts.values()), facts
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) == once
    tokens = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens)
        actual = theirs.eval()(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    if name != "quickstart":
        import_checkpoint(tmp_path / "out", tmp_path / "back")
        back = torch.load(tmp_path / "back" / "lit_model.pth", weights_only=True)
        for table in ("lm_head.weight", "transformer.wte.weight"):
            assert torch.equal(back[table], model.lm_head.weight)


DOCUMENTS = {"attention_document_boundary": "eos", "attention_document_token_id": 0}
STREAM = {"streaming_cache_first": 4, "streaming_cache_window": 16}


@pytest.mark.parametrize("changes", [DOCUMENTS, DOCUMENTS | {"attention_document_restart_positions": True}, STREAM])
def test_what_changes_nothing_within_one_text_is_left_out(tmp_path, changes):
    _, settings, biased = CASES["quickstart"]
    model = make_checkpoint(tmp_path / "checkpoint", {**settings, **changes}, biased)
    lines = export(tmp_path / "checkpoint", tmp_path / "out", "hf")
    (name, value) = list(changes.items())[0 if "attention_document_boundary" in changes else 1]
    (line,) = [line for line in lines if "left out" in line]
    assert line.startswith(f"{name}: {value} is left out: ")
    assert line in (tmp_path / "out" / "README.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    text = torch.randint(1, settings["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(text)
        torch.testing.assert_close(theirs(text).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_padding_on_the_left_changes_nothing(tmp_path):
    _, settings, biased = CASES["code-moe"]
    make_checkpoint(tmp_path / "checkpoint", settings, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = torch.randint(97, (1, 20))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 20])
    with torch.inference_mode():
        expected = theirs(tokens).logits
        torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 5:], expected, rtol=1e-4, atol=1e-4)


def test_whole_numbers_of_an_extended_context(tmp_path, caplog, monkeypatch):
    """As people write them in recipes; transformers warns of numbers that are no floats."""
    _, settings, biased = CASES["llama"]
    yarn = {"factor": 2, "original_max_seq_len": 16, "beta_fast": 16, "beta_slow": 1}
    make_checkpoint(tmp_path / "checkpoint", settings | {"rope_adjustments": yarn}, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [record.message for record in caplog.records if "must be a float" in record.message]


def test_files_are_filled_to_their_size(tmp_path):
    """A tensor that is larger gets one of its own, also as the first."""
    sizes = {"first": 9, "a": 2, "b": 2, "c": 3, "d": 1, "large": 9, "e": 1}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    announced = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert write_shards(announced, iter(tensors.items()), tmp_path, max_bytes=16) == 4 * sum(sizes.values())
    files = [sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert files == [["first"], ["a", "b"], ["c", "d"], ["large"], ["e"]]


def test_shards(tmp_path):
    _, settings, biased = CASES["glm"]
    model = make_checkpoint(tmp_path / "checkpoint", settings, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype="bfloat16", max_shard_bytes=20_000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["num_nextn_predict_layers"] == 0, "llama.cpp would count one"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 20_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1, "who may read them"
    for file in files:
        (header,) = struct.unpack("<Q", (tmp_path / "out" / file).read_bytes()[:8])
        assert header % 8 == 0, "where tensors begin"
    with safe_open(tmp_path / "out" / index["weight_map"]["lm_head.weight"], "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), model.lm_head.weight.bfloat16())
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    with safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as file:
        assert file.get_tensor(name).dtype == torch.float32
        assert file.get_tensor(name).min() == 0


ENDS = {"eos_token": "<|end|>", "bos_token": "<|begin|>"}


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (None, {}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **ENDS}),
        ("generation_config.json", {"eos_token_id": 0, "bos_token_id": 4}),
        ("generation_config.json", {"eos_token_id": [0, 2], "bos_token_id": 4}),
    ],
)
def test_text_in_text_out(tmp_path, file, settings):
    """An own BPE opens, and what it returns is what the model takes; wherever it says how texts begin and end."""
    model = make_checkpoint(tmp_path / "checkpoint", *CASES["quickstart"][1:])
    bpe = Tokenizer(BPE({"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "<|begin|>": 4}, [("a", "b")]))
    bpe.add_special_tokens(list(ENDS.values()))
    bpe.save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    if file is not None:
        (tmp_path / "checkpoint" / file).write_text(json.dumps(settings))
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [tokenizer.special_tokens_map.get(name) for name in ENDS] == [
        None if file is None else e for e in ENDS.values()
    ]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = tokenizer("aba", return_tensors="pt")
    assert inputs.input_ids.tolist() == [[3, 1]]
    written = theirs.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert written[0, 2] == model(inputs.input_ids)[0, -1].argmax()
    for config in (theirs.generation_config, theirs.config):
        found = config.bos_token_id, config.eos_token_id, config.pad_token_id
        assert found == ((None, None, None) if file is None else (4, settings.get("eos_token_id", 0), 0))


@pytest.mark.parametrize("extra", [["<|user|>"], {"user_token": "<|user|>"}])
def test_a_tokenizer_that_transformers_5_saved_opens_in_4(tmp_path, extra):
    """Which calls every fast tokenizer `TokenizersBackend`, and lists special tokens where 4 has names for them."""
    make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
    bpe = Tokenizer(BPE({"<|end|>": 0, "a": 1, "<|user|>": 2}, []))
    bpe.add_special_tokens(["<|end|>", "<|user|>"])
    bpe.save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    settings = {
        "backend": "tokenizers",
        "eos_token": "<|end|>",
        "extra_special_tokens": extra,
        "is_local": True,
        "tokenizer_class": "TokenizersBackend",
    }
    (tmp_path / "checkpoint" / "tokenizer_config.json").write_text(json.dumps(settings))
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.all_special_tokens == ["<|end|>", "<|user|>"]
    inputs = tokenizer("a<|user|>a")
    assert dict(inputs) == {"input_ids": [1, 2, 1], "attention_mask": [1, 1, 1]}
    assert tokenizer.decode(inputs.input_ids, skip_special_tokens=True).split() == ["a", "a"]


def test_special_tokens_of_two_lists():
    """As where one that transformers 4 saved was extended in 5."""
    lists = {"additional_special_tokens": ["<|a|>"], "extra_special_tokens": ["<|b|>"]}
    assert _in_words_of_both(lists) == {"additional_special_tokens": ["<|a|>", "<|b|>"]}


def test_a_share_of_a_head_that_rotates_is_exact(tmp_path):
    """30 of 44 elements: 30 / 44 * 44 is less than 30."""
    make_checkpoint(tmp_path / "checkpoint", {**CASES["glm"][1], "head_size": 44, "rotary_percentage": 0.7}, True)
    assert export_checkpoint(tmp_path / "checkpoint", tmp_path / "out").class_name == "Glm4MoeForCausalLM"
    assert int(json.loads((tmp_path / "out" / "config.json").read_text())["partial_rotary_factor"] * 44) == 30
    assert import_checkpoint(tmp_path / "out", tmp_path / "back").config.rope_n_elem == 30


@pytest.mark.parametrize("name", ["checkpoints/run", "run"])
def test_the_conversion_of_litgpt_names_this_one(tmp_path, monkeypatch, name):
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

    make_checkpoint(tmp_path / "checkpoints" / "run", *CASES["llama"][1:])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not know. `litgpt-moe export` writes it for transformers"):
        convert_lit_checkpoint(Path(name), Path("out"))


class TestRefusals:
    def test_existing_directory(self, tmp_path):
        make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
        (tmp_path / "out").mkdir()
        with pytest.raises(SettingsError, match="out_dir: .* exists"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(SettingsError, match="has no model_config.yaml"):
            export_checkpoint(tmp_path, tmp_path / "out")

    def test_missing_weights(self, tmp_path):
        make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
        file = tmp_path / "checkpoint" / "lit_model.pth"
        state = torch.load(file)
        del state["transformer.h.1.mlp.fc_1.weight"]
        torch.save(state, file)
        with pytest.raises(SettingsError, match=r"missing \['transformer.h.1.mlp.fc_1.weight'\]"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    @pytest.mark.parametrize("format_name", ["hf", "gguf"])
    @pytest.mark.parametrize(
        ("setting", "reason"),
        [
            ("n_embd: 96", r"lm_head.weight is \(97, 48\) instead of \(97, 96\)"),
            ("n_query_groups: 4", r"attn.qkv.weight is \(96, 48\) instead of \(144, 48\)"),
            ("padded_vocab_size: 128", r"lm_head.weight is \(97, 48\) instead of \(128, 48\)"),
            ("n_expert: 6", r"gate.weight is \(7, 48\) instead of \(6, 48\)"),
        ],
    )
    def test_weights_of_another_model(self, tmp_path, setting, reason, format_name):
        make_checkpoint(tmp_path / "checkpoint", *CASES["mixtral"][1:])
        file = tmp_path / "checkpoint" / "model_config.yaml"
        name = setting.partition(":")[0]
        file.write_text(re.sub(rf"\b{name}: .*", setting, file.read_text(), count=1))
        with pytest.raises(SettingsError, match=f"checkpoint_dir: its weights are not .*{reason}; name a whole"):
            export(tmp_path / "checkpoint", tmp_path / "out", format_name)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ({"model": [1, 2]}, "must hold weights by name"),
            ({"lm_head.weight": 3}, "must hold weights by name"),
            ({"lm_head.weight": torch.ones(97, 48, dtype=torch.int8)}, "is int8 instead of floating-point numbers"),
            ({"transformer.h.0.mlp.gate.e_score_correction_bias": torch.ones(())}, r"is \(\) instead of \(7,\)"),
        ],
    )
    def test_what_is_no_weight(self, tmp_path, content, reason):
        make_checkpoint(tmp_path / "checkpoint", *CASES["mixtral"][1:])
        file = tmp_path / "checkpoint" / "lit_model.pth"
        torch.save(content if "model" in content else torch.load(file) | content, file)
        with pytest.raises(SettingsError, match=reason):
            export(tmp_path / "checkpoint", tmp_path / "out", "hf")

    @pytest.mark.parametrize("part", ["", "ema"])
    def test_a_checkpoint_that_is_being_written(self, tmp_path, part):
        make_checkpoint(tmp_path / ".final.incomplete" / part, *CASES["llama"][1:])
        with pytest.raises(SettingsError, match="is being written; name a finished checkpoint"):
            export_checkpoint(tmp_path / ".final.incomplete" / part, tmp_path / "out")
        make_checkpoint(tmp_path / "cut", *CASES["llama"][1:])
        file = tmp_path / "cut" / "lit_model.pth"
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(SettingsError, match="is damaged or cut off"):
            export_checkpoint(tmp_path / "cut", tmp_path / "out")

    def test_no_space(self, tmp_path, monkeypatch):
        make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(SettingsError, match=r"out_dir: .* needs \S+ GB, but .* has 1e-06 GB left; free some space"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "new" / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
        source = read_source(tmp_path / "checkpoint")
        assert source.nbytes(None) == 2 * source.nbytes(torch.bfloat16)

    def test_a_file_where_the_directory_should_be(self, tmp_path):
        make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match="out_dir: .* cannot be made"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "file" / "out")

    def test_a_tokenizer_that_does_not_fit(self, tmp_path):
        make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
        Tokenizer(BPE({f"t{i}": i for i in range(98)}, [])).save(str(tmp_path / "checkpoint" / "tokenizer.json"))
        with pytest.raises(SettingsError, match="has ids up to 97, but the model only 97 embeddings"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    def test_latent_attention_that_no_class_has(self, tmp_path):
        make_checkpoint(tmp_path / "checkpoint", {**CASES["deepseek-v3"][1], "norm_eps": 1e-5}, False)
        with pytest.raises(SettingsError, match="DeepseekV3ForCausalLM has no latent_norm_eps: false"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")

    def test_a_model_from_the_future(self, tmp_path):
        make_checkpoint(tmp_path / "checkpoint", *CASES["llama"][1:])
        with (tmp_path / "checkpoint" / "model_config.yaml").open("a") as file:
            file.write("attention_telepathy: true\n")
        with pytest.raises(SettingsError, match="attention_telepathy"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")

    @pytest.mark.parametrize(
        "change", [{"parallel_residual": True}, {"router_type": "hash"}, {"post_mlp_norm": True}], ids=str
    )
    def test_what_nothing_expresses(self, tmp_path, change):
        settings = {**CASES["mixtral"][1], **change}
        if "router_type" in change:
            settings = {k: v for k, v in settings.items() if not k.startswith("router_") and k != "norm_topk_prob"}
            settings |= change
        make_checkpoint(tmp_path / "checkpoint", settings, False)
        with pytest.raises(SettingsError, match=next(iter(change))):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
