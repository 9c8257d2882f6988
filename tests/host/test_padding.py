"""Padding is not text: a batch with padding is the same training as its documents without, in float64."""

from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from litgpt.data import get_sft_collate_fn
from litgpt.utils import chunked_cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from litgpt_moe_ext.data.packing import pack
from litgpt_moe_ext.data.windows import DocumentWindows
from litgpt_moe_ext.host.padding import mark_finetuning_padding
from litgpt_moe_ext.moe.balancing.bias import update_routers
from litgpt_moe_ext.moe.balancing.metrics import load_metrics, routers_of
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.moe.registry import LOSSES, Loss
from litgpt_moe_ext.moe.routing.fixed_routers import FixedRouter, UniformRouter
from litgpt_moe_ext.tokens import padding
from litgpt_moe_ext.tokens.padding import PADDING, PaddedRows, accept_padding, mark_padding
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from tests.models import initialized_model, moe_config, randomize
from tests.subsets import soon
from tests.training.processes import in_ranks


@pytest.fixture(autouse=True)
def _accepting(monkeypatch):
    monkeypatch.setattr(padding, "_accepted", True)


def rows_of(documents, length):
    """Return rows of `length` + 1 tokens, one document each, and padding."""
    rows = torch.full((len(documents), length + 1), PADDING)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = torch.tensor(document)
    return rows.as_subclass(PaddedRows)


def test_rows_cut_inputs_whose_last_token_has_a_target():
    rows = rows_of([[5, 6, 7], [5, 6, 7, 8], [1, 2, 3, 4, 5]], 4)
    inputs, targets = rows[:, 0:4].contiguous().long(), rows[:, 1:5].contiguous().long()
    p = PADDING
    assert inputs.tolist() == [[5, 6, p, p], [5, 6, 7, p], [1, 2, 3, 4]]
    assert targets.tolist() == [[6, 7, p, p], [6, 7, 8, p], [2, 3, 4, 5]]
    assert type(inputs) is type(targets) is type(rows[0]) is type(rows >= 0) is torch.Tensor
    moved = rows.to("cpu", torch.int32)
    assert isinstance(moved, PaddedRows)


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
DOCUMENTS_APART = {
    "attention_class_name": "SinkAttention", "attention_document_boundary": "bos", "attention_document_token_id": BOS,
    "attention_document_restart_positions": True,
}  # fmt: skip
COEFS = {
    "router_load_balancing_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "router_importance_loss_coef": 0.3,
    "router_orthogonality_loss_coef": 0.2,
}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def model_with(router, **changes):
    """Return a model with every loss that its router can have, in float64, whose documents begin with `BOS`."""
    settings = {**ROUTERS[router], **changes}
    if settings.get("router_type") not in ("hash", "uniform"):
        settings = {**COEFS, **settings}
    if settings.get("router_type") == "noisy_topk":
        settings["router_load_loss_coef"] = 0.2
    config = moe_config(
        block_size=64, norm_class_name="LayerNorm", n_expert_per_token=3, n_shared_expert=1,
        **DOCUMENTS_APART, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = initialized_model(config)
    return randomize(model, 0.3).double()


def step(model, inputs, targets, compiled=None):
    """Return the loss of a step, all gradients, and what the routers have counted and made of it."""
    model.zero_grad()
    routers = list(routers_of(model).values())
    for router in routers:
        if router.bias_update_rate:
            router.e_score_correction_bias.zero_()
    forward = model if compiled is None else compiled
    loss = chunked_cross_entropy(forward(inputs), targets)
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
@pytest.mark.parametrize("backend", soon(["loop", "grouped_cpu"], ["grouped_cpu"]))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, together=st.booleans())
def test_padding_changes_nothing(router, backend, documents, together, same_noise):
    model = model_with(router, expert_backend=backend)
    padded, unpadded = padded_and_not(packed(documents, together))
    torch.testing.assert_close(step(model, *padded), step(model, *unpadded), **EXACT)


def test_a_layer_gives_padding_nothing():
    """What is no number there would reach text through the values of attention."""
    layer = randomize(SharedExpertMoE(moe_config(n_shared_expert=1)))
    real = torch.arange(8) < torch.tensor([[5], [8]])
    y = layer(torch.randn(2, 8, 16), real)
    assert not y[~real].any()
    assert y[real].all()


def test_padding_changes_nothing_where_gates_are_on_inputs():
    model = model_with("sigmoid", expert_backend="grouped_cpu", expert_gate_on_input=True)
    padded, unpadded = padded_and_not(rows_of([[BOS, *range(2, 9)], [BOS], [BOS, 5, 6], [BOS, *range(10, 20)]], 12))
    torch.testing.assert_close(step(model, *padded), step(model, *unpadded), **EXACT)


@pytest.mark.parametrize("router", ["sigmoid", "noisy_topk"])
def test_grouped_products_compute_no_padding(router, same_noise):
    """In float32, as torch has no others; with biases, and with rows of memory as it was found."""
    model = model_with(router, expert_backend="grouped_mm", bias=True).float()
    padded, unpadded = padded_and_not(rows_of([[BOS, *range(2, 9)], [BOS], [BOS, 5, 6], [BOS, *range(10, 20)]], 12))
    torch.testing.assert_close(step(model, *padded), step(model, *unpadded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_losses_per_sequence_leave_padding_out(packing):
    """Sequences of one length, padded to a longer one; then one of padding alone, which is none."""
    model = model_with("sigmoid", router_sequence_balancing_loss_coef=0.4)
    texts = torch.randint(2, 64, (3, 7))  # rows are documents without `BOS` as well
    padded = torch.cat([texts, torch.full((3, 4), PADDING)], dim=1)
    if packing == "pad":
        padded = torch.cat([padded, torch.full((1, 11), PADDING)])
    rows = padded.as_subclass(PaddedRows)
    expected = step(model, texts[:, :-1], texts[:, 1:].contiguous())
    torch.testing.assert_close(step(model, rows[:, :-1], rows[:, 1:].contiguous()), expected, **EXACT)


def test_losses_that_know_no_padding_see_none(monkeypatch):
    monkeypatch.setitem(LOSSES, "z_loss", Loss(lambda logits: logits.logsumexp(-1).square().mean(), ("logits_TE",), ""))
    model = model_with("sigmoid")
    padded, unpadded = padded_and_not(rows_of([[BOS, *range(2, 9)], [BOS, 5, 6]], 8))
    torch.testing.assert_close(step(model, *padded), step(model, *unpadded), **EXACT)
    _, _, records, _, _ = step(model, torch.full((2, 5), PADDING), torch.full((2, 5), PADDING))
    assert not any(record.any() for record in records)
    loss = Loss(lambda logits, n: logits.mean(), ("logits_TE", "n_sequence"), "")
    monkeypatch.setitem(LOSSES, "z_loss", loss)
    model = model_with("sigmoid")
    with pytest.raises(ValueError, match=r"router_z_loss_coef: a loss per sequence must have real_T among its inputs"):
        step(model, *padded)


def test_a_batch_of_padding_alone_is_no_step():
    model = model_with("noisy_topk", router_bias_update_rate=None)
    loss, gradients, records, _, _ = step(model, torch.full((2, 5), PADDING), torch.full((2, 5), PADDING))
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
    assert all(not record.any() for record in records)


@pytest.mark.parametrize("adapter", [False, True])
def test_finetuning_marks_padding_and_prompts_are_text(same_noise, adapter):
    samples = [
        {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([-100] * prompt + ids[prompt:]),
            "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)},
        }
        for ids, prompt in (([BOS, 5, 6, 0, 7], 3), ([BOS, 9], 1), ([BOS, 3, 0, 0, 0, 2, 8], 2))
    ]
    loop = ModuleType("loop")
    if adapter:
        loop.fit = lambda model, train_dataloader, val_dataloader: next(iter(train_dataloader))
    else:
        loop.fit = lambda state, train_dataloader, val_dataloader: next(iter(train_dataloader))
    mark_finetuning_padding(loop)
    loaders = [DataLoader(samples, batch_size=3, collate_fn=get_sft_collate_fn(max_seq_length=6)) for _ in range(2)]
    model = model_with("sigmoid")
    batch = loop.fit(
        model if adapter else {"model": model}, Fabric().setup_dataloaders(loaders[0]), val_dataloader=loaders[1]
    )
    p = PADDING
    assert batch["input_ids"].tolist() == [[BOS, 5, 6, 0, 7, p], [BOS, 9, p, p, p, p], [BOS, 3, 0, 0, 0, 2]]
    real, targets = batch["input_ids"] >= 0, torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    padded = step(model, batch["input_ids"], targets)
    unpadded = step(model, batch["input_ids"][real].unsqueeze(0), targets[real].unsqueeze(0))
    torch.testing.assert_close(padded, unpadded, **EXACT)
    assert next(iter(loaders[1]))["input_ids"].min() < 0


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


@pytest.mark.parametrize("mode", ["full", "selective", "reentrant"])
def test_recomputed_batches_have_their_own_padding(mode):
    """Two batches go forward before one goes backward, so that what is computed again must not look at the last."""
    batches = [rows_of([[BOS, *range(2, 9)], [BOS, 5, 6]], 8), rows_of([[BOS, 7], [BOS, *range(20, 29)]], 9)]
    results = []
    for recomputes in (False, True):
        model = model_with("sigmoid")
        if recomputes and mode == "reentrant":
            for block in model.transformer.h:
                block.forward = partial(checkpoint, block.forward, use_reentrant=True)
        elif recomputes:
            ActivationCheckpointing(mode).on_before_setup(model)
        losses = [chunked_cross_entropy(model(rows[:, :-1]), rows[:, 1:].contiguous()) for rows in batches]
        for loss in losses:
            loss.backward()
        records = [router.tally.take() for router in routers_of(model).values()]
        results.append([losses, [parameter.grad for parameter in model.parameters()], records])
    torch.testing.assert_close(*results, **EXACT)


RAGGED = [[BOS, *range(2, 9)], [BOS, 5, 6, 7]]


def counted_on_a_rank(ranks):
    """Return what the routers have counted over all ranks, and their biases, after a step on this rank's rows."""
    padding._accepted = True
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    rows = rows_of(RAGGED, 9)[rank : rank + 1] if ranks > 1 else rows_of(RAGGED, 9)
    rows = rows.as_subclass(PaddedRows)
    _, _, records, biases, _ = step(model_with("sigmoid"), rows[:, :-1], rows[:, 1:].contiguous())
    return [record[:8] for record in records], biases


@pytest.mark.slow
def test_two_processes_count_text_only():
    """Rows of other lengths on every rank; all that is counted is that of one process, and of the texts."""
    expected = counted_on_a_rank(1)
    assert [int(record.sum()) for record in expected[0]] == [(7 + 3) * 3] * 2
    for counted in in_ranks(counted_on_a_rank, 2, 2):
        torch.testing.assert_close(counted, expected)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["sigmoid", "softmax in groups"])
def test_compiled(router):
    model = model_with(router).float()
    rows = rows_of([[BOS, *range(2, 9)], [BOS, 5, 6]], 10)
    expected = step(model, rows[:, :-1], rows[:, 1:].contiguous())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = step(model, rows[:, :-1], rows[:, 1:].contiguous(), compiled)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
