"""Models that are published in few bits only become the numbers that transformers makes of them."""

import re

import pytest
import torch
from litgpt import GPT, Config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.hf.published.quantized import Quantization, from_mxfp4
from litgpt_moe_ext.export.hf.published.stored import StoredWeights
from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.models import CASES, make_checkpoint
from tests.export.hf.quantized import GPT_OSS_FOR_MXFP4, change_json, to_fp8, to_mxfp4


def exported(folder, name, **changes):
    _, settings, biased = CASES[name]
    make_checkpoint(folder / "checkpoint", {**settings, **changes}, biased)
    export_checkpoint(folder / "checkpoint", folder / "hf")
    return folder / "hf"


def imported(folder):
    """The model, and its weights as they are stored."""
    import_checkpoint(folder / "hf", folder / "back")
    state = torch.load(folder / "back" / "lit_model.pth", weights_only=True)
    model = GPT(Config.from_file(folder / "back" / "model_config.yaml"))
    model.load_state_dict(state)
    return model.eval(), state


def same_logits(model, theirs):
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs.eval()(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_every_code_and_scale_of_mxfp4_is_what_transformers_makes_of_it():
    blocks = torch.arange(256, dtype=torch.uint8).repeat(16).view(1, 256, 1, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    expected = convert_moe_packed_tensors(blocks, scales).mT
    assert torch.equal(from_mxfp4(blocks, scales).view(torch.int16), expected.contiguous().view(torch.int16))


def test_gpt_oss_in_mxfp4(tmp_path):
    hf_dir = exported(tmp_path, "gpt-oss", **GPT_OSS_FOR_MXFP4)
    quantized = to_mxfp4(hf_dir)
    model, stored = imported(tmp_path)
    layer = "transformer.h.1.mlp.experts."
    down = convert_moe_packed_tensors(*quantized["model.layers.1.mlp.experts.down_proj"])
    assert stored[f"{layer}down_proj"].dtype == torch.bfloat16
    assert torch.equal(stored[f"{layer}down_proj"], down.mT)
    needed = sum(tensor.nbytes for tensor in stored.values())
    assert needed <= StoredWeights(hf_dir, Quantization("mxfp4"), False).nbytes() < 1.1 * needed
    state = load_file(hf_dir / "model.safetensors")
    for name, parts in quantized.items():
        del state[f"{name}_blocks"], state[f"{name}_scales"]
        state[name] = convert_moe_packed_tensors(*parts)
    save_file(state, hf_dir / "model.safetensors", {"format": "pt"})
    change_json(hf_dir, quantization_config=None)
    same_logits(model, AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32))


def test_deepseek_in_fp8(tmp_path):
    """Blocks that do not divide the matrices are cut off at the ends."""
    hf_dir = exported(tmp_path, "deepseek-v3")
    to_fp8(hf_dir, (16, 12))
    model, stored = imported(tmp_path)
    state = load_file(hf_dir / "model.safetensors")
    for name in [name for name in state if f"{name}_scale_inv" in state]:
        rows, columns = state[name].shape
        factors = torch.kron(state.pop(f"{name}_scale_inv"), torch.ones(16, 12))[:rows, :columns]
        state[name] = state[name].float() * factors
    assert torch.equal(
        stored["transformer.h.1.attn.kv_b_proj.weight"], state["model.layers.1.self_attn.kv_b_proj.weight"]
    )
    experts = [state[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
    assert torch.equal(stored["transformer.h.2.mlp.experts.down_proj"], torch.stack(experts))
    save_file(state, hf_dir / "model.safetensors", {"format": "pt"})
    change_json(hf_dir, quantization_config=None)
    same_logits(model, AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32))


@pytest.mark.parametrize(("said", "becomes"), [("float16", torch.float16), ("float8_e4m3fn", torch.bfloat16)])
def test_fp8_becomes_the_type_of_the_other_weights(tmp_path, said, becomes):
    """Rounded once."""
    to_fp8(exported(tmp_path, "deepseek-v3"), (16, 8))
    change_json(tmp_path / "hf", dtype=said, torch_dtype=None)
    _, stored = imported(tmp_path)
    state, name = load_file(tmp_path / "hf" / "model.safetensors"), "model.layers.1.self_attn.o_proj.weight"
    expected = (state[name].float() * torch.kron(state[f"{name}_scale_inv"], torch.ones(16, 8))).to(becomes)
    torch.testing.assert_close(stored["transformer.h.1.attn.proj.weight"], expected, rtol=0, atol=0)


class TestRefusals:
    def test_other_methods(self, tmp_path):
        hf_dir = exported(tmp_path, "mixtral")
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"):
            change_json(hf_dir, quantization_config={"quant_method": method})
            with pytest.raises(
                SettingsError, match=f"quant_method: {method}.* must be mxfp4, .*; import the checkpoint"
            ):
                import_checkpoint(hf_dir, tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_scales_that_do_not_fit(self, tmp_path):
        hf_dir = exported(tmp_path, "deepseek-v3")
        to_fp8(hf_dir, (16, 16))
        settings = {"quant_method": "fp8", "weight_block_size": [16, 8]}
        change_json(hf_dir, quantization_config=settings)
        with pytest.raises(SettingsError, match=r"its scales have the shape .*; must be .* for blocks of 16 by 8"):
            import_checkpoint(hf_dir, tmp_path / "back")
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "hf"}

    def test_numbers_without_scales(self, tmp_path):
        hf_dir = exported(tmp_path, "mixtral")
        state = load_file(hf_dir / "model.safetensors")
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.float8_e4m3fn)
        save_file(state, hf_dir / "model.safetensors")
        with pytest.raises(SettingsError, match=r"lm_head.weight is stored as F8_E4M3, and its config.json does not"):
            import_checkpoint(hf_dir, tmp_path / "back")


@pytest.mark.parametrize("name", ["deepseek-v3", "glm"])
def test_layers_for_more_than_one_token_are_left_out(tmp_path, capsys, name):
    """As transformers leaves them out; DeepSeek-V3 and GLM-4.5 are published with one."""
    hf_dir = exported(tmp_path, name)
    state = load_file(hf_dir / "model.safetensors")
    layer = "model.layers.3."
    state |= {layer + "eh_proj.weight": torch.ones(2), layer + "mlp.gate.weight": torch.ones(2)}
    save_file(state, hf_dir / "model.safetensors")
    change_json(hf_dir, num_nextn_predict_layers=0)
    with pytest.raises(SettingsError, match=re.escape(f"surplus ['{layer}")):
        import_checkpoint(hf_dir, tmp_path / "back")
    change_json(hf_dir, num_nextn_predict_layers=1)
    assert main(["import", str(hf_dir), str(tmp_path / "back")]) == 0
    assert "Left out 2 tensors of multi-token prediction (model.layers.3." in capsys.readouterr().out


def test_ernies_are_left_out_and_no_others(tmp_path):
    hf_dir = exported(tmp_path, "ernie")
    state = load_file(hf_dir / "model.safetensors")
    unused = {"model.mtp_emb_norm.0.weight": torch.ones(2), "model.layers.1.mlp.unused.bias": torch.zeros(2)}
    save_file(state | unused, hf_dir / "model.safetensors")
    assert import_checkpoint(hf_dir, tmp_path / "back").left_out == ["model.mtp_emb_norm.0.weight"]
    unused["model.layers.1.mlp.unused.bias"][1] = 1
    save_file(state | unused, hf_dir / "model.safetensors")
    with pytest.raises(SettingsError, match=re.escape("surplus ['model.layers.1.mlp.unused.bias']")):
        import_checkpoint(hf_dir, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 98}, r"lm_head.weight is \(97, 48\); must be \(98, 48\)"),
        ({"intermediate_size": 22}, r"w1.weight is \(20, 48\); must be \(22, 48\)"),
    ],
)
def test_other_shapes_than_the_configuration_says(tmp_path, change, message):
    hf_dir = exported(tmp_path, "mixtral")
    change_json(hf_dir, **change)
    with pytest.raises(SettingsError, match=message):
        import_checkpoint(hf_dir, tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "hf"}
