"""Whole training steps on this card: nothing waits, compiled is eager, sharded is whole, resumed is uninterrupted."""

import contextlib
import math

import pytest
import torch
from litgpt import GPT
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.tokens.padding import PADDING
from tests.gpu.card import no_waits, require_bfloat16
from tests.models import initialized_model, moe_config
from tests.runs import logged

pytestmark = pytest.mark.gpu

PRECISIONS = [torch.bfloat16, torch.float16, None]


def make_config(**changes):
    sizes = {"n_embd": 64, "block_size": 64, "moe_intermediate_size": 32, "n_shared_expert": 1}
    return moe_config(attention_class_name="SinkAttention", router_bias_update_rate=0.01, **(sizes | changes))


def make_model(device, **changes) -> GPT:
    torch.manual_seed(0)
    return initialized_model(make_config(**changes)).to(device)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def loss_of(model, batch, dtype):
    with autocast(batch.device, dtype):
        return chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:].contiguous(), chunk_size=0)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_no_step_waits(device, dtype):
    """Forward, backward, clipping, optimizer and the balancing of experts. (A gradient scaler waits by design.)"""
    if dtype == torch.bfloat16:
        require_bfloat16(device)
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = torch.randint(0, 64, (4, 65), device=device)

    def step():
        loss_of(model, batch, dtype).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    before = model.transformer.h[0].mlp.gate.e_score_correction_bias.clone()
    with no_waits(device):
        step()
    assert not torch.equal(before, model.transformer.h[0].mlp.gate.e_score_correction_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_padding_waits_for_nothing_and_changes_nothing(device, dtype, monkeypatch):
    monkeypatch.setattr("litgpt_moe_ext.tokens.padding._accepted", True)
    if dtype == torch.bfloat16:
        require_bfloat16(device)
    model = make_model(device)
    text = torch.randint(0, 64, (4, 33), device=device)
    # The last token of a text has no target: as an input it is padding.
    inputs = torch.cat([text[:, :-1], text.new_full((4, 32), PADDING)], dim=1)
    targets = torch.cat([text[:, 1:], text.new_full((4, 32), PADDING)], dim=1)

    def loss_and_gradients(inputs, targets):
        with autocast(device, dtype):
            loss = chunked_cross_entropy(model(inputs), targets)
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))

    expected = loss_and_gradients(text[:, :-1], text[:, 1:].contiguous())
    counts = [router.tally.take() for router in routers_of(model).values()]
    loss_and_gradients(inputs, targets)
    [router.tally.take() for router in routers_of(model).values()]
    with no_waits(device):
        padded = loss_and_gradients(inputs, targets)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 5e-2, "atol": 5e-3}
    torch.testing.assert_close(padded, expected, **tolerance)
    padded_counts = [router.tally.take()[:8] for router in routers_of(model).values()]
    assert all(torch.equal(ours, theirs[:8]) for ours, theirs in zip(padded_counts, counts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_litgpt(device, dtype):
    """In one kernel on a card; elsewhere the two are the same anyway."""
    model = make_model(device, norm_eps=1e-3)
    ours = model.transformer.ln_f.to(dtype)
    theirs = type(ours)(64, eps=1e-3).to(device, dtype)
    assert ours.is_fusible
    assert not hasattr(theirs, "is_fusible")
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for norm in (ours, theirs):
        torch.manual_seed(2)
        x = torch.randn(3, 40, 64, device=device, dtype=dtype, requires_grad=True)
        y = norm(x)
        results.append((y, *torch.autograd.grad(y, (x, norm.weight), torch.randn_like(y))))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_compiled_equals_eager(device):
    model = make_model(device)
    batch = torch.randint(0, 64, (2, 65), device=device)
    expected = loss_of(model, batch, None)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    loss = loss_of(compiled, batch, None)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


def test_the_layer_is_one_graph(device):
    with device:  # as Fabric makes it, and not moved there
        layer = initialized_model(make_config()).transformer.h[0].mlp
    assert isinstance(layer, SharedExpertMoE)
    x = torch.randn(2, 32, 64, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x), atol=1e-3, rtol=1e-3)
    y.sum().backward()


@pytest.mark.parametrize("version", [1, 2])
def test_sharded_equals_whole(device, one_process, version):
    batch = torch.randint(0, 64, (2, 65), device=device)
    whole = make_model(device)
    expected = loss_of(whole, batch, None)
    expected.backward()
    sharded = make_model(device)
    if version == 2:
        from torch.distributed.fsdp import fully_shard

        for block in sharded.transformer.h:
            fully_shard(block)
        fully_shard(sharded)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        sharded = FullyShardedDataParallel(sharded, use_orig_params=True, device_id=device)
    loss = loss_of(sharded, batch, None)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in sharded.named_parameters()}
    for name, parameter in whole.named_parameters():
        gradient = gradients[name]
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient.view_as(parameter.grad), parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resumed_bit_for_bit(device, recipe, tmp_path, precision):
    """A run that is interrupted after four steps ends with the weights of one that is not, loss scale included."""
    if "bf16" in precision:
        require_bfloat16(device)
    weights = []
    for name, stops in (("straight", (8,)), ("twice", (4, 8))):
        folder = tmp_path / name
        file = recipe(name, out_dir=str(folder), precision=precision)
        for stop in stops:
            resume = ["--resume", "auto"] if stop != stops[0] else []
            assert main(["--config", str(file), "--train.max_steps", str(stop), *resume]) == 0
        state = torch.load(folder / "final" / "lit_model.pth", map_location="cpu", weights_only=True)
        weights.append(state.get("model", state))
        losses = [float(value) for value in logged(folder, "loss").values()]
        assert len(losses) >= 2
        assert all(math.isfinite(loss) for loss in losses)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
