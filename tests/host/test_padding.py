"""Padded rows: the padding changes neither the loss nor a gradient."""

import pytest
import torch
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.host.padding import accept_padding
from tests.models import initialized_model, moe_config


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(GPT, "forward", GPT.forward)
    # A dense model: in an MoE layer padding takes part in routing.
    return initialized_model(moe_config(mlp_class_name="LLaMAMLP", n_expert=0, moe_intermediate_size=None,
                                        intermediate_size=24))  # fmt: skip


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:].contiguous())
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_padding_counts_nowhere(model):
    accept_padding()
    row = torch.randint(0, 64, (1, 9))
    padded = torch.cat([row, torch.full((1, 7), -100)], dim=1)
    loss, gradients = loss_and_gradients(model, row)
    padded_loss, padded_gradients = loss_and_gradients(model, padded)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_gradients, gradients)


def test_other_runs_keep_the_error_and_other_inputs_their_bits(model):
    tokens = torch.randint(0, 64, (2, 8))
    with pytest.raises(IndexError):
        model(torch.full((1, 4), -100))
    before = model(tokens)
    accept_padding()
    accept_padding()
    assert torch.equal(model(tokens), before)
    assert not hasattr(GPT.forward.__wrapped__, "accepts_padding"), "installed once"
