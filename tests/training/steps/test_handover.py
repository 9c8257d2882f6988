"""What LitGPT's loop gets from the model, and what everybody else does."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.wrappers import _FabricModule

from litgpt_moe_ext.training.parallel.strategies import SingleProcessStrategy
from litgpt_moe_ext.training.steps.graphs.decision import GraphDecision
from litgpt_moe_ext.training.steps.handover import Handover, loss_of_logits
from tests.models import needs_fused_loss
from tests.runs import train

IDS = torch.tensor([[1, 2]])


def set_up(graphs, precision):
    """Return a handover with graphs or without, a model as Fabric wraps it, and the strategy."""
    strategy = SingleProcessStrategy("cpu")
    strategy._precision = precision
    handover = Handover(GraphDecision(None if graphs else "not here", False), print)
    return (
        handover,
        _FabricModule(torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3)), strategy),
        strategy,
    )


def test_only_the_loop_leaves_a_batch_to_the_loss():
    """A callback that calls the model as it trains gets logits."""
    precision = SimpleNamespace(
        forward_context=contextlib.nullcontext, convert_input=lambda ids: ids, convert_output=lambda logits: logits
    )
    handover, model, strategy = set_up(True, precision)
    loss = handover.wrap(lambda logits, targets: logits.sum())
    with handover.installed(model, strategy):
        assert model(IDS).shape == (1, 2, 3)
        handover.expect_batch()
        left = model(IDS)
        assert not isinstance(left, torch.Tensor)
        assert model(IDS).shape == (1, 2, 3)
        assert torch.equal(loss(left, IDS), model(IDS).sum())


def test_only_the_loop_gets_logits_in_16_bits():
    """And a loss function of LitGPT gets them as before."""
    precision = MixedPrecision("bf16-mixed", "cpu")
    handover, model, strategy = set_up(False, precision)
    seen = []

    def cross_entropy(logits, _targets):
        seen.append(logits)
        return logits.sum()

    def note(logits, targets):
        assert logits.dtype == torch.bfloat16
        return to_litgpt(logits, targets)

    to_litgpt = loss_of_logits(cross_entropy, precision)
    loss, expected = handover.wrap(note), model(IDS)
    with handover.installed(model, strategy):
        assert model(IDS).dtype == torch.float32
        handover.expect_batch()
        left = model(IDS)
        assert not isinstance(left, torch.Tensor)
        assert model(IDS).dtype == torch.float32
        loss(left, IDS)
        handover.expect_batch()
        with torch.no_grad():
            assert model(IDS).dtype == torch.float32
        model.eval()
        handover.expect_batch()
        assert model(IDS).dtype == torch.float32
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], expected)
    assert model(IDS).dtype == torch.float32


@pytest.mark.parametrize("graphs", [True, False])
def test_a_validation_leaves_its_batches_to_the_loss(graphs):
    """Not those of callbacks between them, nor what comes after the batch that LitGPT fetches and does not use."""
    handover, model, strategy = set_up(graphs, MixedPrecision("bf16-mixed", "cpu"))
    loss = handover.wrap(lambda logits, targets: made.append(logits.dtype) or logits.sum())
    made, total = [], 0

    @torch.no_grad()
    def validate(fabric, model, batches, max_iters):
        model.eval()
        for number, batch in enumerate(batches):
            if number == max_iters:
                break
            left = model(batch)
            assert not isinstance(left, torch.Tensor)
            assert model(batch).dtype == torch.float32
            nonlocal total
            total += loss(left, batch)
        return total

    with handover.installed(model, strategy):
        assert handover.wrap_validation(validate)(None, model, [IDS, IDS, IDS], max_iters=2) == total
        assert made == [torch.bfloat16] * 2
        with torch.no_grad():
            assert model(IDS).dtype == torch.float32
        model.train()
        assert model(IDS).dtype == torch.float32


def test_the_loop_holds_no_logits():
    """Its variable for them lives until the next batch has some, when there would be two of them."""
    handover, model, strategy = set_up(False, MixedPrecision("bf16-mixed", "cpu"))
    loss = handover.wrap(lambda logits, targets: made.append(weakref.ref(logits)) or logits.sum())
    made = []
    with handover.installed(model, strategy):
        handover.expect_batch()
        logits = model(IDS)
        value = loss(logits, IDS)
        assert value.requires_grad
        assert logits is not None
        assert made[0]() is None


def test_an_error_in_the_model_leaves_fabric_as_it_was():
    precision = MixedPrecision("bf16-mixed", "cpu")
    handover, model, strategy = set_up(False, precision)
    with handover.installed(model, strategy):
        handover.expect_batch()
        with pytest.raises(IndexError):
            model(IDS + 9)
        assert model(IDS).dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@needs_fused_loss
def test_the_fused_loss_multiplies_as_the_head_would(recipe, monkeypatch, tmp_path, precision):
    """Autocast, under which the model computes, is over when the loss is computed."""
    from litgpt_moe_ext.training.callbacks import fused_loss

    types, original = set(), fused_loss.linear_loss

    def linear_loss(x, targets, head, dtype):
        types.add(dtype)
        return original(x, targets, head, dtype)

    monkeypatch.setattr(fused_loss, "linear_loss", linear_loss)
    flags = ("--precision", precision, "--fused_cross_entropy", "true", "--out_dir", tmp_path / "out")
    assert train("--config", recipe(train={"max_tokens": 128}), *flags) == 0
    assert types == {torch.bfloat16}
