"""A step is a mean over its tokens: how it is cut into micro-batches and over ranks changes nothing."""

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.loss.linear import linear_loss
from litgpt_moe_ext.tokens import padding
from litgpt_moe_ext.training.steps.batches import StepBatches, can_pad, counts_for_loss
from litgpt_moe_ext.training.steps.corpora import CorpusLosses
from litgpt_moe_ext.training.steps.losses import RunningMean, TokenMeans
from tests.models import needs_fused_loss
from tests.runs import logged, recipe_writer, train
from tests.training.processes import in_ranks

STEPS, ROWS, LENGTH = 3, 8, 16


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> dict:
    """Arguments of a `TextCorpus` of short documents of very different lengths, one a row."""
    folder = tmp_path_factory.mktemp("padded")
    draw = random.Random(0)
    words = ["the", "a", "one", "two", "it", "was", "and", "so", "on", "then", "far", "near"]
    documents = [" ".join(draw.choices(words, k=draw.choice((1, 2, 3, 30)))) for _ in range(200)]
    (folder / "source.txt").write_text("\n".join(documents))
    settings = {"data_path": str(folder / "prepared"), "source_path": str(folder / "source.txt"), "separator": "\n"}
    return settings | {"bpe": {"vocab_size": 280}, "val_fraction": 0.2, "packing": "pad"}


def train_in_float64(recipe: str) -> int:
    """Train with float64 weights; under `in_ranks` as one of its ranks."""
    if torch.distributed.is_initialized():
        rank, world = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    torch.set_default_dtype(torch.float64)
    try:
        return train("--config", recipe)
    finally:
        torch.set_default_dtype(torch.float32)


def recipe_for(folder: Path, corpus: dict, micro_batch_size: int, devices: int = 1, **changes) -> str:
    folder.mkdir()
    train = {"global_batch_size": ROWS, "micro_batch_size": micro_batch_size, "max_seq_length": LENGTH}
    return str(
        recipe_writer(folder, {})(
            data={"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": corpus},
            train=train | {"max_tokens": STEPS * ROWS * LENGTH, "max_norm": 100.0},
            eval={"interval": 2, "max_iters": 1000},
            devices=devices if devices == 1 else "auto",
            **changes,
        )
    )


def numbers(folder: Path, column: str) -> list[float]:
    return [float(value) for value in logged(folder / "out", column).values()]


def assert_same(ours: Path, theirs: Path, rel: float = 1e-9) -> None:
    for column in ("loss", "grad_norm", "val_loss", "padding", "moe/max_vio"):
        assert numbers(ours, column) == pytest.approx(numbers(theirs, column), rel=rel), column
    first, second = (torch.load(d / "out" / "final" / "lit_model.pth", weights_only=True) for d in (ours, theirs))
    for name, weight in first["model"].items():
        torch.testing.assert_close(weight, second["model"][name], rtol=100 * rel, atol=rel, msg=name)


def test_one_by_eight_and_eight_by_one(padded, tmp_path, capfd, monkeypatch):
    """Losses, gradients, validation and weights of a step of 8 rows are the same however it is accumulated."""
    monkeypatch.setattr(padding, "_accepted", False)
    for micro_batch_size in (1, 8):
        folder = tmp_path / str(micro_batch_size)
        assert train_in_float64(recipe_for(folder, padded, micro_batch_size)) == 0
    assert len(numbers(tmp_path / "1", "val_loss")) == 2
    assert 0.2 < numbers(tmp_path / "1", "padding")[0] < 0.9
    assert_same(tmp_path / "1", tmp_path / "8")
    said, share = capfd.readouterr().out, numbers(tmp_path / "8", "padding")
    assert f"{STEPS} steps of {ROWS * LENGTH} tokens with padding, checkpoints in" in said
    assert not padding.accepts_padding()  # in the next run of the process
    tokens = f"Trained {STEPS * ROWS * LENGTH} tokens, {sum(share) / len(share):.0%} of them padding, in 0:"
    assert tokens in said


@pytest.mark.slow
def test_one_and_two_processes_accumulation_one_and_four(padded, tmp_path):
    """Two processes that accumulate four times equal one that does not, auxiliary losses included."""
    changes = {"model_config": {"router_z_loss_coef": 0.1, "router_sequence_balancing_loss_coef": 0.1}}
    assert train_in_float64(recipe_for(tmp_path / "one", padded, 8, **changes)) == 0
    assert in_ranks(train_in_float64, 2, recipe_for(tmp_path / "two", padded, 1, devices=2, **changes)) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one", rel=1e-7)  # routers keep some sums in float32


@needs_fused_loss
def test_micro_batch_without_targets():
    """It adds no loss and no gradient, with and without the output head fused into the loss."""
    head = torch.nn.Linear(4, 7, bias=False)
    x = torch.randn(1, 3, 4, requires_grad=True)
    targets = torch.full((1, 3), -100)
    for loss in (chunked_cross_entropy(head(x), targets), linear_loss(x, targets, head, x.dtype)):
        gradients = torch.autograd.grad(loss, [x, head.weight])
        assert loss == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_validation_batch_without_targets():
    """Torch's loss of it is no number, and counts nothing."""
    logits, targets = torch.randn(3, 4, 7), torch.tensor([[1, 2, -100, -100], [-100] * 4, [3, 4, 5, 6]])
    means = TokenMeans(ranks=1)
    cross_entropy = lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets)  # noqa: E731
    loss = means.wrap_loss(cross_entropy)
    assert loss(logits[1], targets[1]).isnan()
    validate = means.wrap_validation(lambda fabric, model, loader: [loss(*batch) for batch in loader])
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(validate(None, None, list(zip(logits, targets, strict=True))), expected)
    one = torch.tensor([3, -100, -100, -100])
    torch.testing.assert_close(validate(None, None, [(logits[0], one)]), cross_entropy(logits[0], one))


def test_micro_batches_are_fetched_to_the_end_of_their_step():
    """Also where the first one is not the first of its step, so that a step is never weighed with the next."""
    fetched, batches = iter(range(1, 9)), StepBatches(lambda rows: (counts_for_loss(rows),), accumulation=3, ranks=1)
    batches.counts = True

    def fetch():
        return torch.arange(6).masked_fill(torch.arange(6) >= next(fetched), -100).unsqueeze(0)

    weights = [float(batches.next(fetch, iteration).weights()) for iteration in range(1, 6)]
    # Of two that are left of a step of three, with 1 and 2 targets, and of three with 3, 4 and 5.
    assert weights == pytest.approx([3 * 1 / 3, 3 * 2 / 3, 3 * 3 / 12, 3 * 4 / 12, 3 * 5 / 12])
    batches.on_log(first := {"loss": 0.0})
    batches.next(fetch, 6)
    batches.on_log(second := {"loss": 0.0})
    assert [first["padding"], second["padding"], batches.padding] == pytest.approx([1 - 15 / 30, 0, 1 - 33 / 48])


def test_the_loss_of_a_corpus_is_that_of_all_ranks(monkeypatch):
    """Tokens count the same wherever they are; corpora count by their weights."""
    of_another = torch.tensor([[30.0, 0.0], [10.0, 0.0]])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums_2C: sums_2C.add_(of_another))
    mixture = SimpleNamespace(names=lambda: iter(["a", "b"]), weights={"a": 3, "b": 1})
    losses = CorpusLosses(ranks=2)
    assert losses.mean(mixture, torch.tensor([1.0, 3.0]), torch.tensor([10, 10])) == (3 * 2 + 3) / 4
    losses.on_log(metrics := {"val_loss": 2.25})
    assert metrics == {"val_loss": 2.25, "val_loss/a": 2.0, "val_loss/b": 3.0}
    assert CorpusLosses(ranks=1).mean(mixture, torch.tensor([2.0, 4.0]), torch.tensor([1, 1])) == (3 * 2 + 4) / 4


@pytest.mark.parametrize("targets", [0, 1, 6])
def test_a_micro_batch_that_is_the_step_has_a_weight_of_one_or_none(targets):
    batches = StepBatches(lambda rows: (counts_for_loss(rows),), accumulation=1, ranks=1)
    batches.counts = True
    rows = torch.arange(6).masked_fill(torch.arange(6) >= targets, -100).unsqueeze(0)
    assert batches.next(lambda: rows, 0).weights() == min(targets, 1)


def test_data_that_does_not_say_may_have_padding():
    assert can_pad(object())
    assert not can_pad(SimpleNamespace(windows=SimpleNamespace(pads=False)))


def test_padding_is_what_is_no_text():
    """However many targets the loss leaves out besides, such as those of a prompt."""
    batches = StepBatches(lambda rows: (rows > 5, rows >= 0), accumulation=1, ranks=1)
    batches.counts = True
    batches.next(lambda: torch.tensor([[1, 2, 6, -100]]), 0)
    batches.on_log(metrics := {"loss": 0.0})
    assert metrics["padding"] == 0.25


def test_weights_are_not_rounded_to_16_bits():
    means = TokenMeans(ranks=1)
    means.weights = lambda: torch.tensor([1.001], dtype=torch.float64)
    loss = means.wrap_loss(lambda logits, targets: logits.mean())(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))
    assert loss.item() == pytest.approx(1.001)


def test_running_mean_is_that_of_torchmetrics():
    """Bit for bit, while it fills and when it goes around."""
    from torchmetrics.aggregation import RunningMean as Reference

    ours, theirs = RunningMean(3, sync_on_compute=False).to("cpu"), Reference(3, sync_on_compute=False)
    for loss in torch.rand(12) * 7:
        ours.update(loss)
        theirs.update(loss)
        assert torch.equal(ours.compute(), theirs.compute())


def test_running_mean_of_narrow_losses_is_not_rounded():
    mean = RunningMean(2)
    for loss in (1.0, 1.0078125):
        mean.update(torch.tensor(loss, dtype=torch.bfloat16))
    assert mean.compute().item() == 1.00390625
