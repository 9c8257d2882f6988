"""Passes as CUDA graphs on this card: the same numbers as without, no wait, and a way back."""

from functools import partial

import pytest
import torch
from litgpt.utils import chunked_cross_entropy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from litgpt_moe_ext.attention.document_room import document_room
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.tokens.rows import Rows
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters
from litgpt_moe_ext.training.parallel.strategies import ReplicatedStrategy
from litgpt_moe_ext.training.settings import DistributedArgs, ParameterGroupArgs
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, run_now
from litgpt_moe_ext.training.steps.graphs.graphed_loss import GraphedLoss, GraphOptions
from tests.gpu.card import no_waits, require_bfloat16
from tests.gpu.test_steps import autocast, loss_of, make_config, make_model
from tests.runs import logged, train, weights_of
from tests.training.steps.graphs.passes import Recordings

pytestmark = pytest.mark.gpu


@pytest.fixture
def card(device):
    if device.type != "cuda":
        pytest.skip("this is about graphs themselves, which need a card")
    return device


@pytest.fixture
def place(device, monkeypatch):
    if device.type != "cuda":
        # There is nothing to capture elsewhere. Operators are recorded, of a backend that does not wait.
        monkeypatch.setattr("litgpt_moe_ext.tokens.padding._accepted", False)
        monkeypatch.setattr(f"{__name__}.GraphOptions", partial(GraphOptions, make_capture=Recordings))
        monkeypatch.setattr("tests.gpu.test_steps.make_config", partial(make_config, expert_backend="grouped_mm"))
    return device


GLOBAL = {"router_load_balancing_loss_coef": 1.0, "router_load_balancing_loss_scope": "global_batch"}
DOCUMENTS = {"attention_document_boundary": "eos", "attention_document_token_id": 1}


def trained(card, dtype, accumulation, graphs, share=True, recomputed=None, muon=False, shape=(4, 65), **changes):
    """Return what some steps come to: losses, norms, weights, biases and loads."""
    model, said = make_model(card, **changes), []
    if recomputed is not None:
        ActivationCheckpointing(recomputed).on_before_setup(model)
    if muon:
        optimizer = MuonAdamW(group_parameters(model, ParameterGroupArgs(), split_matrices=True), lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(3)

    def plain_loss(ids, targets):
        with autocast(card, dtype):
            return chunked_cross_entropy(model(ids), targets.contiguous(), chunk_size=0)

    loss_function = validated = plain_loss
    run_task = run_now
    if graphs:
        how = GraphOptions(careful=False, dynamic_sizes=document_room(model.config), sharing=share)
        loss_function = GraphedLoss(plain_loss, model, said.append, how)
        run_task, validated = loss_function.run_task, loss_function.validated
    GpuStep(optimizer, run_task).install()
    clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)
    torch.manual_seed(1)
    numbers, norms, rooms = [], [], set()

    def next_batch():
        # The end of a document is among fewer ids at last, so that there are more documents than were captured.
        ids = torch.randint(0, 64 if len(norms) < 4 else 8, shape, generator=generator)
        batch = (ids.pin_memory() if card.type == "cuda" else ids).as_subclass(Rows).to(card, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]

    def validate():
        model.eval()
        with torch.no_grad():
            numbers.extend(validated(*next_batch()) for _ in range(2))
        model.train()

    def step():
        for i in range(accumulation):
            loss = loss_function(*next_batch())
            (loss * (i + 1)).backward()
            numbers.append(loss.detach())
        norms.append(run_task(GradientTask("clipping", clip, tuple)))
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # a graph must not repeat the rate of its capture
        optimizer.step()
        optimizer.zero_grad()
        if graphs and loss_function._graphs is not None:
            rooms.add(loss_function._graphs.passes.inputs.sizes)

    for i in range(5 if card.type == "cuda" else 3):
        step()
        if i >= 2:
            validate()
    with no_waits(card):
        for _ in range(2 if card.type == "cuda" else 1):
            step()
            validate()
    assert said == (["CUDA graphs: on, from this step"] if graphs else [])
    if graphs and card.type == "cuda":
        assert loss_function._graphs.tasks._captured.keys() == {"clipping", "the optimizer"}
    assert not graphs or loss_function._graphs.validation._captured is not None
    assert not (graphs and changes.keys() >= DOCUMENTS.keys() and card.type == "cuda") or len(rooms) == 2
    loads = [router.record for router in routers_of(model).values()]
    return [*numbers, *norms, *model.state_dict().values(), *loads]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize(
    ("accumulation", "changes"),
    [
        (1, {}),
        (3, {"router_z_loss_coef": 0.01, "router_load_balancing_loss_coef": 0.01}),
        (2, {"expert_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}),
        (3, {"moe_intermediate_size": 544}),
        (2, DOCUMENTS),
        (3, GLOBAL),
        (2, {"muon": True}),
    ],
    ids=["plain", "losses", "dropout", "wide", "documents", "global batch", "Muon"],
)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_equals_the_loss_itself(place, dtype, accumulation, changes, share):
    """Also where micro-batches share casts and sums, on Hopper with wide weights those of torch's grouped product."""
    if dtype == torch.bfloat16:
        require_bfloat16(place)
    make_model(
        place, **{name: value for name, value in changes.items() if name != "muon"}
    )  # which is all that a CPU tries of most
    if place.type == "cpu" and not (share and dtype == torch.bfloat16 and "expert_dropout" in changes):
        pytest.skip("recordings are slow, and their numbers are looked at in tests/training/steps")
    ours = trained(place, dtype, accumulation, True, share, **changes)
    theirs = trained(place, dtype, accumulation, False, **changes)
    again = trained(place, dtype, accumulation, False, **changes)
    # Bits can only be compared where the card repeats its own: an H100 does at this length, whose attention is short.
    if not all(torch.equal(a, b) for a, b in zip(theirs, again, strict=True)):
        pytest.skip("without graphs, two trainings differ here as well")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 1, "intermediate_size": 96}, DOCUMENTS | GLOBAL])
def test_activations_are_computed_again(card, mode, changes):
    ours = trained(card, torch.float16, 2, True, recomputed=mode, **changes)
    theirs = trained(card, torch.float16, 2, False, recomputed=mode, **changes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_cast_once_for_a_step(place, dtype):
    """What is kept are the experts' weights in 16 bits; a replayed micro-batch casts none of them."""
    if dtype == torch.bfloat16:
        require_bfloat16(place)
    model = make_model(place)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    how = GraphOptions(careful=False)
    loss_function = GraphedLoss(lambda *batch: loss_of(model, batch[0], dtype), model, print, how)
    batch = torch.randint(0, 64, (4, 65), device=place)

    def step():
        for _ in range(2):
            loss_function(batch, batch).backward()
        model.zero_grad()

    for _ in range(4):
        step()
    kept = list(loss_function._weights._casts.values())
    assert sum(cast.numel() for cast in kept) == sum(p.numel() for module in experts for p in module.parameters())
    assert {cast.dtype for cast in kept} == {dtype}
    with torch.no_grad():
        for module in experts:
            for parameter in module.parameters():
                parameter.data.mul_(2)  # of which a version knows nothing
    step()
    for (weight, _), cast in loss_function._weights._casts.items():
        assert torch.equal(weight.to(dtype), cast)


def four_steps(model, loss_function, place):
    """Of which the third captures."""
    for _ in range(4):
        batch = torch.randint(0, 64, (4, 65), device=place)
        loss_function(batch, batch).backward()
        model.zero_grad()


def test_a_model_that_waits_goes_on_without(card):
    model, said = make_model(card), []
    moe = model.transformer.h[0].mlp
    compute = moe.forward
    moe.forward = lambda x, *rest: compute(x * float(x.detach().abs().max() >= 0), *rest)
    how = GraphOptions(careful=True)
    loss_function = GraphedLoss(lambda ids, targets: loss_of(model, ids, None), model, said.append, how)
    four_steps(model, loss_function, card)
    assert len(said) == 1
    assert said[0].startswith("CUDA graphs: off (the model waits for the device, at ")
    assert "test_graphs.py" in said[0]


def test_a_capture_that_fails_harms_nothing(card):
    """A wait that first happens during the capture; randomness must go on as well."""

    def run(graphs):
        model, said, waits = make_model(card, expert_dropout=0.1), [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def plain_loss(ids, targets):
            loss = loss_of(model, ids, None)
            if waits and torch.cuda.is_current_stream_capturing():
                loss.item()
            return loss

        graphed_loss = GraphedLoss(plain_loss, model, said.append, GraphOptions(careful=True))
        loss_function = graphed_loss if graphs else plain_loss
        torch.manual_seed(0)
        generator = torch.Generator(card).manual_seed(3)
        for step in range(6):
            waits[:] = [True] * (step >= 2)
            batch = torch.randint(0, 64, (4, 65), device=card, generator=generator)
            loss_function(batch, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return said, [p.detach().clone() for p in model.parameters()]

    (said, ours), (_, theirs) = run(True), run(False)
    # What broke it off, not that it could not be ended, which torch 2.11 says.
    assert "operation not permitted when stream is capturing" in said[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_replay_that_differs_is_not_used(place):
    """Of a model that counts its passes in Python, which a graph does not."""
    model, said, passes = make_model(place), [], []

    def counted_loss(ids, targets):
        passes.append(ids)
        return loss_of(model, ids, None) * (1 + 0.1 * len(passes))

    loss_function = GraphedLoss(counted_loss, model, said.append, GraphOptions(careful=True))
    four_steps(model, loss_function, place)
    assert len(said) == 1
    assert said[0].startswith("CUDA graphs: off (replayed, the loss is ")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("packing", ["stream", "pad", "documents"])
def test_runs(card, recipe, tmp_path, capsys, precision, packing):
    """A run of the command line, straight and interrupted, is the one without graphs."""
    if "bf16" in precision:
        require_bfloat16(card)
    documents = packing == "documents"
    model = {"attention_document_boundary": "eos", "attention_document_token_id": 0} if documents else {}
    file = recipe(precision=precision, model_config=model, sample={"prompts": ["def "], "max_new_tokens": 3})
    flags = ["--config", file, "--data.init_args.packing", "stream" if documents else packing]
    straight, twice, without = (tmp_path / name for name in ("straight", "twice", "without"))
    assert train(*flags, "--out_dir", straight, "--cuda_graphs", "true") == 0
    assert "CUDA graphs: on, from this step" in capsys.readouterr().out
    for more in (["--train.max_steps", 8], ["--resume", "auto"]):
        assert train(*flags, "--out_dir", twice, "--cuda_graphs", "true", *more) == 0
    assert train(*flags, "--out_dir", without, "--cuda_graphs", "false") == 0
    assert "CUDA graphs: off (as asked)" in capsys.readouterr().out
    weights = weights_of(without / "final")
    for other in (straight, twice):
        for column in ("loss", "val_loss"):
            assert logged(other, column) == logged(without, column)
        ours = weights_of(other / "final")
        assert all(torch.equal(ours[name], value) for name, value in weights.items())


def test_ddp_exchanges_where_graphs_were_awaited(card, one_process):
    """DDP's hooks read gradients on the stream that waits for the graphs before."""
    strategy, streams = ReplicatedStrategy("cuda", DistributedArgs()), []
    strategy.parallel_devices = [card]
    model = make_model(card)
    ddp = strategy.setup_module(model)

    def noting(state, bucket):
        streams.append(torch.cuda.current_stream())
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, noting)
    how = GraphOptions(careful=False, exchange=strategy.exchange_gradients)
    loss_function = GraphedLoss(lambda ids, targets: loss_of(model, ids, None), ddp, print, how)
    four_steps(model, lambda *batch: strategy.in_place_of_forward(loss_function, *batch), card)
    assert len(streams) >= 4
    assert set(streams) == {strategy._stream}
