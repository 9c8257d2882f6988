"""The benchmark of generation compares what it says."""

import itertools
import json

import torch

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.inspect import generation
from litgpt_moe_ext.inspect.generation import Workload, as_dense, benchmark, contenders, initialized
from litgpt_moe_ext.model_size import count_parameters
from tests.models import moe_config, noisy_config


def test_contenders_share_weights_and_active_size():
    config = noisy_config(n_shared_expert=1)
    model = initialized(config)
    models, reasons = contenders(model)
    assert list(models) == ["NoisyTopKMoE", "LLaMAMoE", "dense twin"]
    assert reasons == []
    ids = torch.randint(0, 64, (2, 8))
    assert torch.allclose(models["NoisyTopKMoE"](ids), models["LLaMAMoE"](ids), atol=1e-5)
    routers = config.n_layer * 2 * config.n_expert * config.n_embd
    assert count_parameters(as_dense(config)).total == count_parameters(config).active - routers


def test_only_the_experts_of_the_dense_twin_differ():
    kept = {"position_embedding": "learned", "clip_qkv": 1.0, "mlp_activation": "relu"}
    twin = as_dense(moe_config(attention_class_name="SinkAttention", rotary_percentage=0.0, **kept))
    assert twin.mlp_class_name == "FeedForward"
    assert {name: getattr(twin, name) for name in kept} == kept


def test_a_missing_contender_is_explained():
    models, reasons = contenders(initialized(moe_config(mlp_activation="relu")))
    assert list(models) == ["SharedExpertMoE", "dense twin"]
    assert models["dense twin"].config.mlp_activation == "relu"
    assert any("mlp_activation: relu" in reason for reason in reasons)


def test_what_is_counted(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(generation, "_now", lambda device: float(next(seconds)))
    model = initialized(moe_config())
    done = []
    workload = Workload(batch_sizes=(1, 3), prompt_length=5, new_tokens=4, rounds=2)
    timings = benchmark({"a": model}, workload, done.append)
    assert len(done) == 2 * 3
    for timing, batch in zip(timings, (1, 3), strict=True):
        assert timing.batch_size == batch
        assert (timing.time_to_first_token, timing.prefill, timing.decode) == (1.0, batch * 5, batch * 3)
        # Two layers, keys and values, two groups of four float32, nine positions.
        assert timing.kv_cache == batch * 2 * 2 * 2 * 4 * 4 * 9
        assert timing.weights >= 4 * count_parameters(model.config).total


def test_command_on_a_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    fields = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "padded_vocab_size": 64, "vocab_size": 64}
    moe = {"mlp_class_name": "NoisyTopKMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 8}
    recipe.write_text(json.dumps({"model_config": {**fields, **moe}}))
    result = tmp_path / "result.json"
    arguments = ["benchmark-generation", str(recipe), "--new_tokens=3", "--rounds=1", f"--json={result}"]
    assert main([*arguments, "--prompt_length=8", "--batch_sizes=2"]) == 0
    assert [t["model"] for t in json.loads(result.read_text())["timings"]] == ["NoisyTopKMoE", "LLaMAMoE", "dense twin"]
    assert "decode/s" in capsys.readouterr().out
    assert main([*arguments, "--prompt_length=15"]) == 2
    assert "block size of 16" in capsys.readouterr().err
