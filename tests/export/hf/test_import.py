"""Imported models compute what transformers computes, and are what was exported."""

import json
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from litgpt import GPT, Config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import load_tokenizer
from litgpt_moe_ext.export.facts import facts_of
from litgpt_moe_ext.export.hf.published.config import read_published
from litgpt_moe_ext.export.hf.published.quantized import Quantization
from litgpt_moe_ext.export.hf.published.stored import StoredWeights
from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.write import export_checkpoint
from litgpt_moe_ext.export.source import TRAINING_ONLY, ends_of_texts
from litgpt_moe_ext.training.phases.inputs import open_tokenizer
from tests.export.gguf.tokenizers import train_bpe
from tests.export.hf.models import CASES, SOON, make_checkpoint
from tests.subsets import soon

OWN = [name for name, (class_name, _, _) in CASES.items() if class_name.startswith("LitGPT")]


@pytest.fixture
def exported(tmp_path, request):
    _, settings, biased = CASES[request.param]
    model = make_checkpoint(tmp_path / "checkpoint", settings, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    return tmp_path, model


# Its export rotates neighbours in a head, and so does what is imported again.
HALVES = "deepseek-v3-half"


def imported(folder) -> GPT:
    import_checkpoint(folder / "hf", folder / "back")
    model = GPT(Config.from_file(folder / "back" / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(folder / "back" / "lit_model.pth", weights_only=True))
    return model


@pytest.mark.parametrize("exported", [HALVES], indirect=True)
def test_rotated_halves(exported):
    """Of heads become neighbours there, and stay halves where a checkpoint is stored so."""
    folder, original = exported
    tokens = torch.randint(97, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(imported(folder)(tokens), original(tokens))
    config = AutoConfig.from_pretrained(folder / "hf")
    assert config.rope_interleave
    config.rope_interleave = False
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    (folder / "halves").mkdir()
    theirs.save_pretrained(folder / "halves" / "hf")
    with torch.inference_mode():
        torch.testing.assert_close(imported(folder / "halves")(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("exported", soon((name for name in CASES if name != HALVES), SOON), indirect=True)
def test_round_trip(exported):
    folder, original = exported
    model = imported(folder)
    assert (folder / "back" / "generation_config.json").is_file()
    state, expected = model.state_dict(), original.state_dict()
    for name, tensor in expected.items():
        if name.endswith(TRAINING_ONLY):
            assert not state[name].any()  # exports have none
        elif name.endswith("correction_bias") and model.config.n_expert_groups:
            # Exported with the smallest at 0: the same choice.
            torch.testing.assert_close(state[name] - state[name].mean(), tensor - tensor.mean(), rtol=0, atol=1e-6)
        else:
            assert torch.equal(state[name], tensor), name
    surplus = set(state) - set(expected)
    assert all(name.endswith("bias") and not state[name].any() for name in surplus)
    if not surplus:
        ours, theirs = facts_of(original.config, expected), facts_of(model.config, state)
        assert replace(ours, config=None) == replace(theirs, config=None)


@pytest.mark.parametrize("exported", OWN, indirect=True)
def test_a_model_of_our_own_code_comes_back_after_training_in_transformers(exported):
    folder, _ = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)
    tokens = torch.randint(97, (2, 20))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    theirs(tokens, labels=tokens).loss.backward()
    optimizer.step()
    theirs.eval().save_pretrained(folder / "trained" / "hf")
    model = imported(folder / "trained")
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exported", OWN[:1], indirect=True)
@pytest.mark.parametrize(("name", "value", "message"), [
    ("litgpt_config", {"norm_class_name": []}, ".*norm_class_name: .. must be one of RMSNorm or LayerNorm"),
    ("litgpt_config", None, "litgpt_config: None must be the fields of the model that was exported; export it again"),
    ("num_attention_heads", 2, "num_attention_heads: 2 must be 4, as litgpt_config has it; copy config.json again"),
])  # fmt: skip
def test_entries_of_our_own_code_that_contradict_each_other(exported, name, value, message):
    folder, _ = exported
    config = folder / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(SettingsError, match=f"hf_dir: {message}"):
        imported(folder)
    assert not (folder / "back").exists()


@pytest.mark.parametrize(("exported", "family"), [("llama", "Gemma"), ("gpt2", "OLMo")], indirect=["exported"])
def test_a_name_that_makes_other_norms(exported, family):
    """LitGPT's norms add 1 to their weights in a model called Gemma, and have none in one called OLMo."""
    folder, original = exported
    (folder / "hf").rename(folder / f"{family}-like")
    (folder / "hf").symlink_to(folder / f"{family}-like")
    tokens, model = torch.randint(97, (2, 20)), imported(folder)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), original(tokens))
    with pytest.raises(SettingsError, match=f"model_config.name: .* must be without '{family}' for an export"):
        facts_of(replace(model.config, name=f"{family}-like"), {})


@pytest.mark.parametrize(("exported", "prefix"), [("gpt2", "transformer."), ("llama", "model.")], indirect=["exported"])
def test_weights_that_were_saved_without_an_output_head(exported, prefix):
    """As OpenAI's GPT-2 is published: names begin where those of the model without a head do, and the head is tied."""
    folder, original = exported
    file, config = folder / "hf" / "model.safetensors", folder / "hf" / "config.json"
    weights = load_file(file)
    written = config.read_text()
    config.write_text(json.dumps(json.loads(written) | {"tie_word_embeddings": True}))
    with pytest.raises(SettingsError, match=f"lm_head.weight and {prefix}[a-z_]*.weight differ; say false"):
        imported(folder)
    config.write_text(written)
    del weights["lm_head.weight"]
    save_file({name.removeprefix(prefix): tensor for name, tensor in weights.items()}, file)
    with pytest.raises(SettingsError, match=r"missing \['lm_head.weight'\]"):
        imported(folder)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    original.lm_head.weight = original.transformer.wte.weight
    tokens = torch.randint(97, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(imported(folder)(tokens), original(tokens))


@pytest.mark.parametrize("exported", ["mixtral"], indirect=True)
def test_the_command_says_how_to_train_on(exported, capsys):
    folder, _ = exported
    file, config = folder / "hf" / "model.safetensors", folder / "hf" / "config.json"
    ends = {}
    for tied in (False, True):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": tied}))
        weights = load_file(file)
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
        assert main(["import", str(folder / "hf"), str(folder / f"is {tied}")]) == 0
        ends[tied] = shlex.split(capsys.readouterr().out.splitlines()[-1])
    for tied, flags in ((False, []), (True, ["--train.tie_embeddings", "true"])):
        new = str(folder / f"is {tied}")
        assert ends[tied][-len(flags) - 4 :] == ["--model_config", new, "--initial_checkpoint_dir", new, *flags]


@pytest.mark.parametrize("exported", ["gpt2"], indirect=True)
def test_a_tokenizer_whose_file_names_no_class(exported):
    """As GPT-2's, whose end of a text is in another file; LitGPT would not open it."""
    folder, _ = exported
    train_bpe(folder / "hf", "gpt-2", 320)
    (folder / "hf" / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (folder / "hf" / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": 7}')
    for open_there in (load_tokenizer, lambda there: open_tokenizer(there, 320)):
        with pytest.raises(SettingsError, match='cannot be opened.* add "tokenizer_class": "PreTrained'):
            open_there(folder / "hf")
    imported(folder)
    assert load_tokenizer(folder / "back").eos_id == 7
    assert json.loads((folder / "back" / "tokenizer_config.json").read_text())["model_max_length"] == 1024


@pytest.mark.parametrize("exported", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("size", "left", "problem"),
    [
        (97, None, None),
        (98, None, r"the tokenizer in '.*back' has ids up to 97, but the model only 97 embeddings; .*"),
        (97, 99, r"the tokenizer in .*back cannot be opened \(.*"),
        (97, 0, r".*hf has no tokenizer \(tokenizer.json or tokenizer.model\)"),
    ],
    ids=["whole", "large", "cut", "none"],
)
def test_what_is_wrong_with_the_tokenizer_is_said_at_once(exported, capsys, size, left, problem):
    """Not only by `litgpt generate`; the weights are imported all the same."""
    folder, _ = exported
    content = Tokenizer(WordLevel({str(i): i for i in range(size)}, unk_token="0")).to_str()[:left]
    if content:
        (folder / "hf" / "tokenizer.json").write_text(content)
        (folder / "hf" / "tokenizer_config.json").write_text("{}")
    assert main(["import", str(folder / "hf"), str(folder / "back")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "litgpt generate" in line]
    expected = rf"{problem}\. `litgpt generate` needs one in {folder / 'back'}"
    assert (len(said) == 1 and re.fullmatch(expected, said[0])) if problem else not said, said


@pytest.mark.parametrize("exported", ["gpt2"], indirect=True)
def test_ends_of_texts_that_only_the_description_of_the_model_names(exported):
    """Where there is no `generation_config.json`, transformers takes them from `config.json`."""
    folder, original = exported
    train_bpe(folder / "hf", "gpt-2", 320)
    (folder / "hf" / "tokenizer_config.json").write_text("{}")
    (folder / "hf" / "generation_config.json").unlink()
    config = folder / "hf" / "config.json"
    beyond = original.config.padded_vocab_size
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": beyond, "eos_token_id": [0, 9]}))
    imported(folder)
    tokenizer = load_tokenizer(folder / "back")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0), "no model has the other"
    assert ends_of_texts(folder / "back", tokenizer, original.config.padded_vocab_size) == [0, 9]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": []}))
    (folder / "hf" / "tokenizer_config.json").write_text("[]")  # which whoever reads it will report
    import_checkpoint(folder / "hf", folder / "none")
    assert not (folder / "none" / "generation_config.json").exists()


@pytest.mark.parametrize("exported", ["qwen3-moe"], indirect=True)
def test_stacked_experts(exported):
    """As transformers 5 has them in memory."""
    folder, original = exported
    file = folder / "hf" / "model.safetensors"
    state = load_file(file)
    layer = "model.layers.1.mlp.experts."
    get = lambda part: torch.stack([state.pop(f"{layer}{e}.{part}.weight") for e in range(7)])  # noqa: E731
    gate, up, down = get("gate_proj"), get("up_proj"), get("down_proj")
    state |= {layer + "gate_up_proj": torch.cat([gate, up], dim=1), layer + "down_proj": down}
    save_file(state, file)
    import_checkpoint(folder / "hf", folder / "back")
    back = torch.load(folder / "back" / "lit_model.pth", weights_only=True)
    assert torch.equal(back["transformer.h.1.mlp.experts.gate_up_proj"], torch.cat([gate, up], dim=1))
    assert torch.equal(back["transformer.h.1.mlp.experts.down_proj"], down)


@pytest.mark.parametrize("exported", ["mixtral"], indirect=True)
class TestRefusals:
    def test_unknown_architecture(self, exported):
        folder, _ = exported
        config = json.loads((folder / "hf" / "config.json").read_text())
        (folder / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "telepathy"}))
        with pytest.raises(SettingsError, match="is a telepathy; known architectures: .*mixtral"):
            import_checkpoint(folder / "hf", folder / "back")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("model_type", [], r"is a \[\]; known architectures"),
            ("hidden_size", "x", "n_embd: 'x' must be an integer"),
            ("num_attention_heads", 0, "n_head: 0 must be an integer of at least 1"),
            ("num_hidden_layers", -1, "n_layer: -1 must be"),
            ("num_key_value_heads", 3, "n_query_groups: 3 must divide n_head: 4"),
            ("vocab_size", None, "vocab_size: null must be an integer"),
            ("rms_norm_eps", True, "norm_eps: True must be a number"),
            ("rope_theta", [], "config.json' is damaged .*list"),
            ("rope_theta", 10**30, r"rope_base: 10+\d+ must be a number above 1 and at most 1e18"),
            ("head_dim", 3, "head_dim: 3, of which 3 elements are rotated in pairs"),
            ("quantization_config", "fp8", "quantization_config: 'fp8' must be settings by name"),
            (
                "quantization_config",
                {"quant_method": "fp8", "weight_block_size": [0, "x"]},
                "without weight_block_size",
            ),
            ("rope_scaling", "yarn", "rope_scaling: 'yarn' must be settings by name"),
            ("rope_scaling", {"rope_type": "linear", "factor": "x"}, "describes no model .*factor"),
            ("rope_scaling", {"rope_type": "linear"}, "rope_scaling: .* has no factor"),
            ("rope_scaling", {"rope_type": []}, r"rope_type: \[\] must be one of default, linear"),
            ("rope_scaling", {"factor": 2.0}, "rope_type: None must be one of default, linear"),
        ],
    )
    def test_nonsense_in_the_configuration(self, exported, key, value, message):
        folder, _ = exported
        config = json.loads((folder / "hf" / "config.json").read_text())
        (folder / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(SettingsError, match=f"hf_dir: .*{message}"):
            import_checkpoint(folder / "hf", folder / "back")
        assert not (folder / "back").exists()

    def test_missing_and_surplus_tensors(self, exported):
        folder, _ = exported
        file = folder / "hf" / "model.safetensors"
        state = load_file(file)
        state["model.telepathy"] = state.pop("model.norm.weight")
        save_file(state, file)
        with pytest.raises(SettingsError, match=r"missing \['model.norm.weight'\], surplus \['model.telepathy'\]"):
            import_checkpoint(folder / "hf", folder / "back")
        assert not (folder / "back").exists()

    def test_existing_directory(self, exported):
        folder, _ = exported
        with pytest.raises(SettingsError, match="out_dir: .* exists"):
            import_checkpoint(folder / "hf", folder / "checkpoint")

    def test_no_space(self, exported, monkeypatch):
        folder, _ = exported
        size = sum(tensor.nbytes for tensor in load_file(folder / "hf" / "model.safetensors").values())
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1))
        with pytest.raises(SettingsError, match="out_dir: .* needs .* GB, but .* left; free some space"):
            import_checkpoint(folder / "hf", folder / "back")
        assert not (folder / "back").exists()

    def test_pickled_weights(self, exported):
        folder, _ = exported
        (folder / "hf" / "model.safetensors").rename(folder / "hf" / "pytorch_model.bin")
        with pytest.raises(SettingsError, match="has neither model.safetensors nor model.safetensors.index.json"):
            import_checkpoint(folder / "hf", folder / "back")

    def test_files_elsewhere(self, exported):
        folder, _ = exported
        (folder / "hf" / "model.safetensors").rename(folder / "model.safetensors")
        index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
        (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(SettingsError, match=r"names '../model.safetensors', which is outside the directory"):
            import_checkpoint(folder / "hf", folder / "back")

    def test_cut_off_file(self, exported):
        folder, _ = exported
        file = folder / "hf" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(SettingsError, match="model.safetensors' cannot be read"):
            import_checkpoint(folder / "hf", folder / "back")


@pytest.mark.parametrize("exported", ["mixtral"], indirect=True)
def test_an_index_from_before(exported):
    """transformers does not look at one beside a file with all weights."""
    folder, original = exported
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(imported(folder).lm_head.weight, original.lm_head.weight)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "index.json' cannot be read"),
        ('{"weight_map": {"a": 3}}', "index.json' cannot be read"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "names '../a.safetensors', which is outside the directory"),
        ('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors' cannot be read"),
    ],
)
def test_an_index_that_names_no_files_of_the_directory(tmp_path, index, message):
    (tmp_path / "hf").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SettingsError, match=f"^hf_dir: .*{message}"):
        StoredWeights(tmp_path / "hf", Quantization(), tied=False)


def test_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "0123abcd")
    (tmp_path / "hf" / "a.safetensors").symlink_to(tmp_path / "0123abcd")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    assert torch.equal(StoredWeights(tmp_path / "hf", Quantization(), tied=False).get("a"), torch.ones(2))


@pytest.mark.parametrize("folder", ["a-name", "models--owner--a-name/snapshots/0123abcd"])
def test_a_model_has_the_name_of_its_repository(tmp_path, folder):
    """In the cache of the hub it lies in a folder that is named by the commit."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    assert read_published(tmp_path / folder).settings["name"] == "a-name"


def test_tied_embeddings_are_stored_once(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = GPT(import_checkpoint(tmp_path / "hf", tmp_path / "back").config)
    ours.load_state_dict(torch.load(tmp_path / "back" / "lit_model.pth", weights_only=True))
    tokens = torch.randint(97, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
