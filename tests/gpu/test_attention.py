"""Every attention kernel of this card against the written-out softmax in float32, in models with all patterns."""

import pytest
import torch
from litgpt import GPT

from litgpt_moe_ext.attention import flash, rotation
from litgpt_moe_ext.attention.kernels.registry import KERNELS
from litgpt_moe_ext.attention.sinks import Softmax, sink_attention
from tests.gpu.card import no_waits
from tests.models import dense_config, randomize

pytestmark = pytest.mark.gpu

PATTERNS = {
    "plain": {},
    "window": {"sliding_window_size": 24, "sliding_window_indices": [1, 1]},
    "documents": {"attention_document_boundary": "eos", "attention_document_token_id": 1},
}


def loss_and_gradients(model, idx):
    model.zero_grad()
    logits = model(idx).float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None and "attn" in name}
    return loss.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "eager"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
def test_parity(device, backend, pattern, sinks, dtype):
    changes = {"n_embd": 128, "n_head": 2, "n_query_groups": 1, "block_size": 128, **PATTERNS[pattern]}
    config = dense_config(attention_class_name="SinkAttention", attention_sinks=sinks, intermediate_size=64, **changes)
    torch.manual_seed(1)
    model = randomize(GPT(config), std=0.08).to(device)
    idx = torch.randint(0, 64, (2, 128), device=device)
    model.config.attention_backend = "eager"
    expected_loss, expected = loss_and_gradients(model, idx)
    model = model.to(dtype)
    model.config.attention_backend = backend
    try:
        loss, gradients = loss_and_gradients(model, idx)
    except ValueError as refused:
        if "cannot be used here" not in str(refused):
            raise
        pytest.skip(str(refused))
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(loss, expected_loss, atol=tolerance, rtol=tolerance)
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert difference < tolerance, name


@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_sinks_are_added_in_one_launch_that_waits_for_nothing(device, head_size, monkeypatch):
    """The same bits twice, and what torch's operators give. (Kernels may add up gradients of q in any order.)"""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shapes = (2, 4, 300, head_size), (2, 2, 300, head_size), (2, 2, 300, head_size)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
    sinks, dout = torch.randn(4, device=device).requires_grad_(), torch.randn(shapes[0], device=device, dtype=dtype)
    softmax = Softmax(sinks, head_size**-0.5)

    def run():
        out = sink_attention(q, k, v, softmax)
        return out.detach(), *torch.autograd.grad(out, (sinks, q), dout)

    first = run()
    assert flash._has_epilogue(first[0], torch.empty(0)) == (device.type == "cuda")
    with no_waits(device):
        second = run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    monkeypatch.setattr(flash, "_has_epilogue", lambda out, lse: False)
    torch.testing.assert_close(first, run(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("head_size", "n_elem", "interleave", "dtype"),
    [
        (64, 64, False, torch.bfloat16),
        (64, 64, False, torch.float32),
        (128, 128, False, torch.float16),
        (96, 24, False, torch.bfloat16),
        (128, 64, True, torch.bfloat16),
        (24, 2, False, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2], ids=["one table", "a table for each row"])
def test_a_rotation_is_one_launch_that_waits_for_nothing(
    device, rows, head_size, n_elem, interleave, dtype, monkeypatch
):
    """The same bits twice, and what LitGPT's functions give; gradients too."""
    H, G, T = 6, 2, 300
    qkv = torch.randn(2, T, (H + 2 * G) * head_size, device=device).to(dtype).requires_grad_()
    angle = torch.rand(rows, T, n_elem // 2, device=device).mul(6).repeat(1, 1, 2)
    tables = angle.cos(), angle.sin()
    douts = [torch.randn(2, n, T, head_size, device=device).to(dtype) for n in (H, G, G)]
    rotary, used = rotation.Rotary(tables, n_elem, interleave), []

    def run():
        rotated = rotation.rotate_projection(qkv, (H, G), rotary)
        q, k, v = rotation._split(qkv, (H, G))
        q, k = rotation.rotate_both(q, k, rotary)
        used.append(rotated is not None)
        both = [(q, k, v), rotated if rotated is not None else (q, k, v)]
        return [x for results in both for x in (*results, torch.autograd.grad(results, qkv, douts, True)[0])]

    first = run()
    with no_waits(device):
        second = run()
    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))
    monkeypatch.setattr(rotation, "_has_kernel", lambda *_: False)
    expected = run()
    assert used == [device.type == "cuda"] * 2 + [False]
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance)
