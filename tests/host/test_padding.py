"""Padding is not text: a batch with padding is the same training as its documents without, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext import padding
from litgpt_moe_ext.data.packing import pack
from litgpt_moe_ext.data.windows import DocumentWindows
from litgpt_moe_ext.moe.balancing import update_routers
from litgpt_moe_ext.moe.fixed_routers import FixedRouter, UniformRouter
from litgpt_moe_ext.moe.metrics import load_metrics, routers_of
from litgpt_moe_ext.padding import PADDING, PaddedRows, accept_padding, mark_padding, n_real
from tests.models import initialized_model, moe_config, randomize


@pytest.fixture(autouse=True)
def _accepting(monkeypatch):
    monkeypatch.setattr(padding, "_accepted", True)


def rows_of(documents, length):
    """Return rows of `length` + 1 tokens, one document each, and padding."""
    rows = torch.full((len(documents), length + 1), PADDING)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = torch.tensor(document)
    return PaddedRows.of(rows)


def test_rows_cut_inputs_whose_last_token_has_a_target():
    rows = rows_of([[5, 6, 7], [5, 6, 7, 8], [1, 2, 3, 4, 5]], 4)
    assert n_real(rows) == 2 + 3 + 4
    inputs, targets = rows[:, 0:4].contiguous().long(), rows[:, 1:5].contiguous().long()
    p = PADDING
    assert inputs.tolist() == [[5, 6, p, p], [5, 6, 7, p], [1, 2, 3, 4]]
    assert targets.tolist() == [[6, 7, p, p], [6, 7, 8, p], [2, 3, 4, 5]]
    assert type(inputs) is type(targets) is type(rows[0]) is type(rows >= 0) is torch.Tensor
    moved = rows.to("cpu", torch.int32)
    assert isinstance(moved, PaddedRows)
    assert n_real(moved) == 9
    assert n_real(torch.zeros(3, 5)) == 12


BOS = 1
ROUTERS = {
    "sigmoid": {"router_bias_update_rate": 0.1},
    "softmax in groups": {
        "router_score_function": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1,
    },
    "noisy_topk": {"router_type": "noisy_topk"},
    "hash": {"router_type": "hash"},
    "uniform": {"router_type": "uniform"},
}  # fmt: skip
LOSSES = {"router_load_balancing_loss_coef": 0.5, "router_z_loss_coef": 0.1, "router_importance_loss_coef": 0.3}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def model_with(router, **changes):
    """Return a model with every loss that its router can have, in float64, whose documents begin with `BOS`."""
    settings = {**ROUTERS[router], **changes}
    if settings.get("router_type") not in ("hash", "uniform"):
        settings = {**LOSSES, **settings}
    if settings.get("router_type") == "noisy_topk":
        settings["router_load_loss_coef"] = 0.2
    config = moe_config(
        block_size=64, norm_class_name="LayerNorm", n_expert_per_token=3, n_shared_expert=1,
        attention_class_name="SinkAttention", attention_document_boundary="bos", attention_document_token_id=BOS,
        attention_document_restart_positions=True,
        **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = initialized_model(config)
    return randomize(model, 0.3).double()


def step(model, inputs, targets):
    """Return the loss of a step, all gradients, and what the routers have counted and made of it."""
    model.zero_grad()
    routers = list(routers_of(model).values())
    for router in routers:
        if router.bias_update_rate:
            router.e_score_correction_bias.zero_()
    loss = chunked_cross_entropy(model(inputs), targets)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    update_routers(routers)
    records = [router.record for router in routers]
    biases = [router.e_score_correction_bias.clone() for router in routers if router.bias_update_rate]
    return loss.detach(), gradients, records, biases, load_metrics(model)


def padded_and_not(rows):
    """Return inputs and targets of rows, and those of one long row with the same texts and no padding."""
    texts = [row[row >= 0] for row in rows.as_subclass(torch.Tensor)]
    inputs = torch.cat([text[:-1] for text in texts]).unsqueeze(0)
    targets = torch.cat([text[1:] for text in texts]).unsqueeze(0)
    return (rows[:, :-1], rows[:, 1:].contiguous()), (inputs, targets)


def packed(documents, together):
    """Return the rows of 12 + 1 tokens into which a data module packs documents."""
    lengths = np.array([len(document) for document in documents])
    windows = DocumentWindows([np.concatenate(documents)], pack(lengths, 12, together), 12)
    return windows.gather(np.arange(len(windows)))


DOCUMENTS = st.lists(
    st.lists(st.integers(2, 63), min_size=1, max_size=12).map(lambda text: [BOS, *text]), min_size=1, max_size=4
)


@pytest.fixture
def same_noise(monkeypatch):
    """Draw what is random from the tokens, whatever stands beside them."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.sin(7 * x))
    monkeypatch.setattr(UniformRouter, "rank", FixedRouter.by_token_id)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", ["loop", "grouped_cpu"])
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, together=st.booleans())
def test_padding_changes_nothing(router, backend, documents, together, same_noise):
    model = model_with(router, expert_backend=backend)
    padded, unpadded = padded_and_not(packed(documents, together))
    torch.testing.assert_close(step(model, *padded), step(model, *unpadded), **EXACT)


def test_a_mask_becomes_ids_below_zero():
    ids, real = torch.tensor([[1, 2, 0]]), torch.tensor([[True, True, False]])
    assert mark_padding(ids, real).tolist() == [[1, 2, PADDING]]


def test_elsewhere_ids_below_zero_are_an_error_and_other_inputs_keep_their_bits(monkeypatch):
    monkeypatch.setattr(padding, "_accepted", False)
    model, tokens = initialized_model(moe_config()), torch.randint(0, 64, (2, 8))
    with pytest.raises(IndexError):
        model(torch.full((1, 4), PADDING))
    before = model(tokens)
    accept_padding()
    assert torch.equal(model(tokens), before)
