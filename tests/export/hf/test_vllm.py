"""What vLLM computes, by the options that an export names.

`VLLM_PYTHON=PYTHON pytest -m vllm` with a Python that has vLLM, also the one for CPUs.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.models import CASES, MOE, TIED, make_checkpoint
from tests.export.hf.transformers5 import expect_of

SCRIPT = Path(__file__).with_name("compare_with_vllm.py")
# What vLLM has attention kernels for.
SIZES = {"n_embd": 128, "head_size": 32, "moe_intermediate_size": 64, "intermediate_size": 64}
LATENT_SIZES = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
OWN = [name for name, (class_name, _, _) in CASES.items() if class_name.startswith("LitGPT")]


def sized(settings: dict[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if name in settings}
    if "rope_adjustments" in settings:
        # Tables of angles end at this length times `factor`.
        sizes["rope_adjustments"] = settings["rope_adjustments"] | {"original_max_seq_len": 32}
    if "latent_attention" in settings:
        sizes["latent_attention"] = LATENT_SIZES
        return {name: value for name, value in (settings | sizes).items() if name != "head_size"}
    if "shared_expert_intermediate_size" in settings:
        sizes["shared_expert_intermediate_size"] = 64
    return settings | sizes


@pytest.mark.vllm
@pytest.mark.parametrize("compiled", [False, True])
def test_log_probabilities_and_tokens(tmp_path, compiled):
    python = os.environ.get("VLLM_PYTHON")
    if python is None:
        pytest.skip("set VLLM_PYTHON to a Python with vLLM, whose torch is another one than LitGPT's")
    cases = tmp_path / "cases"
    plain = ("quickstart", "code-moe", "gpt-moe") if compiled else CASES
    names = [*((name, False) for name in plain), *((name, True) for name in TIED)]
    for name, tied in names:
        _, settings, biased = CASES[name]
        case = f"{name}-tied" if tied else name
        model = make_checkpoint(tmp_path / "checkpoints" / case, sized(settings), biased, tied)
        done = export_checkpoint(tmp_path / "checkpoints" / case, cases / case / "out")
        expect_of(model, cases / case, options=done.serve.partition(str(cases / case / "out"))[2])
    command = [python, str(SCRIPT), str(cases), *(["--compiled"] if compiled else [])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("log-probabilities within") == len(names)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3-moe", ""),
        ("deepseek-v3-half", ""),
        ("gpt-oss", ""),
        ("gpt-oss-without-router-bias", " --model-impl transformers"),
        ("olmoe-clipped", " --model-impl transformers"),
        ("ernie", " --model-impl transformers"),
        ("quickstart", " --trust-remote-code"),
    ],
)
def test_command(tmp_path, name, options):
    """Without each of these options vLLM 0.32 stopped, or computed something else."""
    make_checkpoint(tmp_path / "checkpoint", *CASES[name][1:])
    done = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert done.serve == f"vllm serve {tmp_path / 'out'}{options}"
    assert f"\nvllm serve PATH{options}\n" in (tmp_path / "out" / "README.md").read_text()


def attend(module, query, key, value, attention_mask, scaling, s_aux, **kwargs):
    """As vLLM attends: causally, by what it reads from the configuration and the layer."""
    assert attention_mask is None
    config, n_token = module.config, query.size(2)
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    seen = torch.ones(n_token, n_token, dtype=torch.bool).tril()
    if config.layer_types[module.layer_idx] == "sliding_attention":
        seen = seen.triu(1 - config.sliding_window)
    scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(-1, -1, n_token, 1)], dim=-1)
    output = scores.softmax(-1)[..., :n_token] @ value
    return output.transpose(1, 2).reshape(n_token, -1), None


@pytest.mark.parametrize("name", OWN)
def test_own_code_by_a_serving_engine(tmp_path, monkeypatch, name):
    """Which brings its attention, passes positions and no mask, and takes the first of a tuple for hidden states."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", attend)
    _, settings, biased = CASES[name]
    original = make_checkpoint(tmp_path / "checkpoint", settings, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert model.is_backend_compatible()
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).lm_head
    tokens = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(1))
    model.config._attn_implementation = "vllm"
    with torch.inference_mode():
        hidden, *_ = model(tokens, position_ids=torch.arange(24)[None], use_cache=False, return_dict=False)
        torch.testing.assert_close(head(hidden), original(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_what_serving_engines_replace(tmp_path, name):
    """Modules called `experts` with stacked weights, by experts gated by SiLU; routers with DeepSeek's names."""
    _, settings, biased = CASES[name]
    make_checkpoint(tmp_path / "checkpoint", settings, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config = model.config
    plain = config.hidden_act == "silu" and config.gated and not config.mlp_bias and not config.gate_on_input
    places = {module.rpartition(".")[2] for module, _ in model.named_modules() if module.endswith("experts")}
    assert places - {"shared_experts"} == ({"experts"} if plain else {"plain_experts"})
    if plain:
        (experts,) = (module for module_name, module in model.named_modules() if module_name.endswith("0.mlp.experts"))
        assert {name for name, _ in experts.named_parameters()} == {"gate_up_proj", "down_proj"}
    assert not any("e_score_correction_bias" in parameter for parameter, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "gpt-moe", "partial-rotary-geglu"])
def test_compiled_in_one_graph(tmp_path, name):
    _, settings, biased = CASES[name]
    make_checkpoint(tmp_path / "checkpoint", settings, biased)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).last_hidden_state
        compiled = torch.compile(model, backend="eager", fullgraph=True)(tokens).last_hidden_state
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_balancing_bias_stays_float32(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", {**MOE, "attention_sinks": True}, True)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype="bfloat16")
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    assert model.layers[0].mlp.gate.balancing_bias.dtype == torch.float32
    assert model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
