"""Options of the layer and the model: sinks per layer, dropout, learned positions, longer contexts; their errors."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import yaml
from litgpt import Config
from litgpt.generate import base
from litgpt.model import GPT
from litgpt.utils import save_config
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt_moe_ext.attention.rope import build_rope_cache, rope_frequencies
from tests.attention.attend import sink_attention
from tests.models import attention_config, initialized_model, randomize

LEARNED = {"position_embedding": "learned", "rotary_percentage": 0.0}
T = 12


def test_sinks_per_layer() -> None:
    model = GPT(attention_config(attention_sinks=[True, False], attention_sink_init=-1.5))
    first, second = (block.attn for block in model.transformer.h)
    first.reset_parameters()
    assert (first.sinks == -1.5).all()
    assert second.sinks is None
    everywhere, nowhere = GPT(attention_config()), GPT(attention_config(attention_sinks=False))
    everywhere.load_state_dict(model.state_dict(), strict=False)
    nowhere.load_state_dict(model.state_dict(), strict=False)
    everywhere.transformer.h[1].attn.sinks.data.fill_(-float("inf"))  # no sink
    nowhere.transformer.h[0] = model.transformer.h[0]
    idx = torch.randint(40, (2, T))
    torch.testing.assert_close(model(idx), everywhere(idx))
    torch.testing.assert_close(model(idx), nowhere(idx))


def test_clipping_bounds_queries_keys_and_values() -> None:
    free, clipped = (GPT(attention_config(**changes)).double() for changes in ({}, {"clip_qkv": 0.6}))
    randomize(free, 0.4)
    clipped.load_state_dict(free.state_dict())
    for block in free.transformer.h:
        block.attn.qkv.register_forward_hook(lambda module, inputs, qkv: qkv.clamp(-0.6, 0.6))
    idx = torch.randint(40, (2, T))
    torch.testing.assert_close(clipped(idx), free(idx))


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("backend", ["eager", "flash_cpu"])
def test_a_forced_backend_computes_the_same(has_sinks: bool, backend: str) -> None:
    window = {"sliding_window_size": 4, "sliding_window_indices": [0, 1]}
    model = GPT(attention_config(attention_sinks=has_sinks, **window)).double()
    randomize(model, 0.4)
    idx = torch.randint(40, (2, T))
    expected = model(idx)
    model.config.attention_backend = backend
    torch.testing.assert_close(model(idx), expected)


@pytest.mark.parametrize("has_sinks", [True, False])
def test_attention_dropout(has_sinks: bool) -> None:
    model = GPT(attention_config(attention_dropout=0.5, attention_sinks=has_sinks, n_layer=1)).double()
    randomize(model, 0.4)
    idx = torch.randint(40, (1, T))
    plain = GPT(attention_config(attention_sinks=has_sinks, n_layer=1)).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(idx), plain(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))
    # The attention's output is linear in the weights that are dropped, so its mean over masks is that without dropout.
    layer, x = model.transformer.h[0].attn, torch.randn(1, T, 24, dtype=torch.float64)
    cos, sin = model.cos[None, :T], model.sin[None, :T]
    many = layer(x.expand(4000, -1, -1), cos, sin)
    error = (many.mean(0, keepdim=True) - layer.eval()(x, cos, sin)).abs()
    assert (error < 5 * many.std(0) / 4000**0.5).all()
    assert many.std(0).mean() > 0.3


def test_attention_dropout_survives_recomputation() -> None:
    q, k, v = (torch.randn(2, 4, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    attend = partial(sink_attention, scale=0.4, dropout=0.3, backend="eager")
    torch.manual_seed(1)
    expected = torch.autograd.grad(attend(q, k, v, sinks).square().sum(), (q, k, v, sinks))
    torch.manual_seed(1)
    out = checkpoint(attend, q, k, v, sinks, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v, sinks)), expected)


def test_embedding_dropout() -> None:
    model = GPT(attention_config(embedding_dropout=0.5, **LEARNED))
    randomize(model, 0.4)
    seen = []
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    idx = torch.randint(40, (2, T))
    model.eval()(idx)
    model.train()(idx)
    expected = model.transformer.wte(idx) + model.transformer.wpe.weight[:T]
    torch.testing.assert_close(seen[0], expected)
    kept = seen[1] != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[1][kept], 2 * expected[kept])


@pytest.mark.parametrize("has_sinks", [True, False])
def test_learned_positions(has_sinks: bool, tmp_path: Path) -> None:
    config = attention_config(attention_sinks=has_sinks, **LEARNED)
    model = initialized_model(config)
    assert model.transformer.wpe.weight.shape == (32, 24)
    assert 0.05 < model.transformer.wpe.weight.std() < 0.3  # as the token embedding
    randomize(model, 0.4)
    idx = torch.randint(40, (1, T)).expand(2, T)
    out = model(idx)
    model(torch.zeros(1, T, dtype=torch.long)).sum().backward()
    assert (model.transformer.wpe.weight.grad[:T] != 0).any(dim=1).all()
    assert (model.transformer.wpe.weight.grad[T:] == 0).all()

    # A checkpoint has them, and a model of the saved configuration takes them.
    torch.save(model.state_dict(), tmp_path / "model.pth")
    save_config(config, tmp_path)
    loaded = GPT(Config.from_file(tmp_path / "model_config.yaml")).eval()
    loaded.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    torch.testing.assert_close(loaded(idx), out)

    with torch.inference_mode():
        loaded.set_kv_cache(2)
        outs = [loaded(idx[:, chunk], input_pos=chunk) for chunk in torch.arange(T).split([5, *[1] * 7])]
        torch.testing.assert_close(torch.cat(outs, dim=1), out, rtol=1e-4, atol=1e-5)
        position = torch.tensor([[8], [5]])
        per_sequence = loaded(idx.gather(1, position), input_pos=position)
        torch.testing.assert_close(per_sequence[:, 0], out[torch.arange(2), position[:, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seq_len", [10, 16, 40])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_dynamic_ntk_equals_hugging_face(seq_len: int, factor: float) -> None:
    adjustments = {"factor": factor, "original_max_seq_len": 16, "dynamic": True}
    hf = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, rope_theta=5000.0, max_position_embeddings=16,
        rope_scaling={"rope_type": "dynamic", "factor": factor},
    )  # fmt: skip
    expected, expected_factor = ROPE_INIT_FUNCTIONS["dynamic"](hf, torch.device("cpu"), seq_len=seq_len)
    frequencies, attention_factor = rope_frequencies(8, 5000.0, adjustments, seq_len=seq_len)
    torch.testing.assert_close(frequencies, expected)
    assert attention_factor == expected_factor == 1.0
    config = attention_config(rope_adjustments=adjustments, rope_base=5000, block_size=seq_len)
    cos, _ = build_rope_cache(config, 8)
    torch.testing.assert_close(cos[7, :4], (7 * expected).cos())


DYNAMIC = {"factor": 4.0, "original_max_seq_len": 8, "dynamic": True}
YARN = {"factor": 4.0, "original_max_seq_len": 8, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize("adjustments", [YARN, DYNAMIC], ids=str)
def test_generation_past_the_original_context(adjustments: dict[str, Any]) -> None:
    model = GPT(attention_config(rope_adjustments=adjustments)).eval()
    randomize(model, 0.4)
    model.max_seq_length = 30
    assert model.cos.shape == (30, 8)
    prompt = tokens = torch.randint(40, (5,))
    with torch.inference_mode():
        while tokens.numel() < 30:
            tokens = torch.cat((tokens, model(tokens[None])[0, -1].argmax().view(1)))
    model.set_kv_cache(1)
    assert torch.equal(base.generate(model, prompt, 30, temperature=0.0), tokens)


def test_a_checkpoint_says_which_yarn_it_used(tmp_path: Path) -> None:
    # The class name does: `SinkAttention` stands for Hugging Face's formula, no name for LitGPT's own.
    ours, litgpts = (
        attention_config(rope_adjustments=YARN),
        attention_config(rope_adjustments=YARN, attention_class_name=None),
    )
    for name, config in (("ours", ours), ("litgpts", litgpts)):
        (tmp_path / name).mkdir()
        save_config(config, tmp_path / name)
        saved = yaml.safe_load((tmp_path / name / "model_config.yaml").read_text())
        assert saved.get("attention_class_name") == config.attention_class_name
        assert saved["rope_adjustments"] == YARN
        loaded = Config.from_file(tmp_path / name / "model_config.yaml")
        assert torch.equal(GPT(loaded).cos, GPT(config).cos)
    assert not torch.allclose(GPT(ours).cos, GPT(litgpts).cos)


@pytest.mark.parametrize("op_name", ["_scaled_dot_product_flash_attention_for_cpu", "mul"])
def test_selective_activation_checkpointing(op_name: str) -> None:
    calls = []
    saved = getattr(torch.ops.aten, op_name)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        calls.append((context.is_recompute, op.overloadpacket))
        return CheckpointPolicy.MUST_SAVE if op.overloadpacket is saved else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = (torch.randn(2, 4, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return sink_attention(*inputs, scale=0.4).sin()

    expected = torch.autograd.grad(attend(q, k, v, sinks).sum(), (q, k, v, sinks))
    out = checkpoint(
        attend, q, k, v, sinks,
        use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v, sinks)), expected)
    assert (False, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu) in calls


@pytest.mark.slow
def test_compiles_once_for_all_lengths(caplog: pytest.LogCaptureFixture) -> None:
    model = GPT(attention_config(sliding_window_size=5, sliding_window_indices=[0, 1]))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    caplog.set_level(logging.ERROR)
    for length in (12, 17, 29, 31):
        idx = torch.randint(40, (2, length))
        out, expected = compiled(idx), model(idx)
        torch.testing.assert_close(out, expected)
    assert counter.frame_count <= 3
    parameters, dout = list(model.parameters()), torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, parameters, dout), torch.autograd.grad(expected, parameters, dout)
    )


DOCUMENTS = {"attention_document_boundary": "eos", "attention_document_token_id": 3}
STREAMING = {"streaming_cache_first": 4, "streaming_cache_window": 8}


def test_a_streaming_cache_may_be_as_long_as_the_context() -> None:
    config = attention_config(**{**STREAMING, "streaming_cache_window": 28})
    assert config.streaming_cache_first + config.streaming_cache_window == config.block_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_sinks": [True]}, r"attention_sinks: \[True\] must be true or false, or a list of 2 \(n_layer\)"),
        (
            {"attention_sinks": [True] * 3},
            r"attention_sinks: \[True, True, True\] must be .* a list of 2",
        ),
        ({"attention_sinks": "yes"}, "attention_sinks: 'yes' must be true or false, or a list"),
        ({"attention_sink_init": float("nan")}, "attention_sink_init: nan must be a number"),
        ({"attention_sink_init": 1.0, "attention_sinks": False}, "attention_sink_init: 1.0 would be ignored"),
        ({"attention_backend": "triton"}, "attention_backend: 'triton' is unknown; choose from flash_cpu"),
        ({"attention_dropout": 1.0}, "attention_dropout: 1.0 must be a number of at least 0 and below 1"),
        ({"embedding_dropout": -0.1}, "embedding_dropout: -0.1 must be a number of at least 0 and below 1"),
        ({"position_embedding": "sinusoidal"}, "position_embedding: 'sinusoidal' is unknown; choose from learned"),
        ({"position_embedding": "learned"}, "rotary_percentage: 1.0 must be 0 with position_embedding: learned"),
        ({**LEARNED, "scale_embeddings": True}, "scale_embeddings: True does not go with position_embedding"),
        ({"attention_document_token_id": 3}, "attention_document_token_id: 3 would be ignored"),
        ({"attention_document_boundary": "eot"}, "attention_document_boundary: 'eot' is unknown; choose from eos, bos"),
        ({"attention_document_boundary": "bos"}, "attention_document_token_id: null must be an integer of at least 0"),
        ({**DOCUMENTS, "attention_document_token_id": 40}, "attention_document_token_id: 40 must .* from 0 to 39"),
        ({**DOCUMENTS, "attention_document_restart_positions": 1}, "restart_positions: 1 must be true or false"),
        ({"streaming_cache_window": 8}, "streaming_cache_first: null and streaming_cache_window: 8 must both be set"),
        ({**STREAMING, "streaming_cache_window": 29}, "33 tokens together, .* use at most 28"),
        ({**STREAMING, "streaming_cache_first": 32}, "streaming_cache_first: 32 leaves no room for .*32.; use less"),
        ({**STREAMING, **DOCUMENTS}, "streaming_cache_window: 8 does not go with attention_document_boundary: 'eos'"),
        (
            {**STREAMING, "rope_local_base_freq": 100.0, "rope_indices": [0, 1]},
            "streaming_cache_window: 8 does not go with rope_local_base_freq: 100.0",
        ),
        ({**STREAMING, **LEARNED}, "streaming_cache_window: 8 does not go with position_embedding: 'learned'"),
        ({"clip_qkv": 1.0, "norm_qk": True}, "clip_qkv: 1.0 does not go with norms of single heads; set norm_qk_type"),
        ({"attention_class_name": None, "attention_dropout": 0.1}, "attention_dropout: 0.1 would be ignored because"),
        ({"rope_adjustments": {"factor": 2.0, "dynamic": True}}, "lacks original_max_seq_len; dynamic NTK needs it"),
        ({"rope_adjustments": {**YARN, "dynamic": True}}, "dynamic: True does not go with beta_fast, beta_slow"),
        (
            {"rope_adjustments": {"factor": 2.0, "original_max_seq_len": 8, "dynamic": 1}},
            "dynamic: 1 must be true or false",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_config(**changes)
