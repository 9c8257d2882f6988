"""What runs side by side in a graph, on the null GPU that computes: `test_numbers.py` runs it."""

import contextlib

import pytest
import torch
from torch import nn

from litgpt_moe_ext.kernels.side_stream import goes_aside, gradients, join, part, side_by_side
from litgpt_moe_ext.moe.kernels import step_weights
from litgpt_moe_ext.moe.kernels.backend import ExpertBackend
from litgpt_moe_ext.moe.kernels.registry import BACKENDS, register_backend
from litgpt_moe_ext.moe.registry import EXPERT_BACKENDS
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from litgpt_moe_ext.training.steps.graphs.capture import CudaCapture
from tests.models import initialized_model, moe_config
from tests.null_gpu.computing import capture

CARD = torch.device("cuda")


def make_loss(recomputed=None, **changes):
    """Return a loss that shares casts of the experts' weights, a batch for it, and its model."""
    torch.manual_seed(0)
    settings = {"n_layer": 1, "n_embd": 32, "moe_intermediate_size": 32, "n_expert": 4, **changes}
    model = initialized_model(moe_config(**settings)).to(CARD)
    if recomputed is not None:
        ActivationCheckpointing(recomputed).on_before_setup(model)
    ids = torch.arange(32, device=CARD).view(2, 16)
    weights = step_weights.StepWeights()

    def loss(ids, targets):
        with torch.autocast("cuda", torch.bfloat16), weights.shared():
            return model(ids).float().logsumexp(-1).mean()

    loss(ids, ids).backward()  # kernels are compiled
    model.zero_grad()
    weights.keep()
    weights.refresh()
    return loss, ids, model


def captured(function):
    """Return a graph of what a function launches, and the function's result."""
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        result = function()
    return graph, result


def replays(passes):
    """Yield after each replay of both passes, in one order after the other."""
    for _ in range(3):
        passes.forward()
        passes.scale.fill_(1)
        passes.backward()
        yield


@pytest.mark.parametrize("joins", [True, False])
def test_a_race_within_a_graph_is_seen(joins):
    """Three replays have three orders, in one of which a stream reads what the other has yet to write."""
    ones, zeros = torch.ones(3, device=CARD), torch.zeros(3, device=CARD)

    def function():
        zeros.fill_(0)
        with part(zeros):
            zeros.add_(ones)
        if joins:
            join()
        total = zeros + 1
        join()
        return total

    graph, total = captured(function)
    sums = []
    for _ in range(3):
        graph.replay()
        sums.append(float(total.sum()))
    assert (sums == [6.0, 6.0, 6.0]) == joins, sums


def test_what_nothing_waits_for_cannot_be_captured():
    ones = torch.ones(3, device=CARD)

    def function():
        with part(ones):
            ones.add_(1)

    with pytest.raises(RuntimeError, match="was not made to wait for"):
        captured(function)


def test_a_join_waits_for_all_parts_once():
    """For both streams; the next capture, in which neither has done anything, waits for none."""
    ones, zeros = torch.ones(3, device=CARD), torch.zeros(3, device=CARD)

    def function():
        with part(ones):
            ones.add_(1)
        with gradients(zeros):
            zeros.fill_(2)
        join()
        return ones + zeros

    def alone():
        join()
        return ones + 1

    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    with side_by_side():
        with torch.cuda.graph(graphs[0]):
            both = function()
        with torch.cuda.graph(graphs[1]):
            one = alone()
    for n in range(1, 4):
        graphs[0].replay()
        graphs[1].replay()
        assert both.tolist() == [n + 3.0] * 3
        assert one.tolist() == [n + 2.0] * 3


def test_only_small_parts_of_what_is_captured_go_aside():
    small, large = torch.ones(8, device=CARD), torch.empty(2**20 + 1, device=CARD)
    found = []

    def function():
        found.extend([goes_aside(small), goes_aside(large), goes_aside(torch.ones(8))])
        with gradients(small):
            found.append(goes_aside(small))
            small.add_(1)
        join()

    captured(function)
    assert found == [True, False, False, False]
    assert not goes_aside(small)
    with side_by_side():
        assert not goes_aside(small)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert not goes_aside(small)
        small.add_(1)


def test_what_a_part_reads_stays_until_its_backward_pass_is_over():
    """The first stream, which has let go of it, allocates meanwhile, and may run ahead."""
    linear = nn.Linear(16, 16, bias=False, device=CARD)
    scale = nn.Parameter(torch.full((16, 16), 0.5, device=CARD))
    values = torch.arange(256.0, device=CARD).view(16, 16) / 256

    def loss(ids, targets):
        del ids, targets
        y = values
        for _ in range(4):
            y = (y * scale).tanh()
        x = values + 1
        with part(x):
            z = linear(x)
        join()
        return y.sum() + z.sum()

    batch = torch.zeros(2, dtype=torch.int64, device=CARD)
    expected = torch.autograd.grad((values + 1).detach().matmul(linear.weight.t()).sum(), [linear.weight])
    with side_by_side():
        passes = CudaCapture().passes(loss, batch, batch, add=False)
    for _ in replays(passes):
        torch.testing.assert_close(passes.gradients[linear.weight], expected[0])


@pytest.fixture
def other_backend():
    """Adds what it is given to the tokens, and knows of no streams."""

    def function(x_TD, routing, weights, hidden, added_TD):
        return x_TD * 0.5 + (0.0 if added_TD is None else added_TD)

    register_backend(ExpertBackend("other", function, lambda place: None, adds=True))
    yield
    del BACKENDS["other"]
    EXPERT_BACKENDS.remove("other")


@pytest.mark.parametrize(
    "changes",
    [
        {"shared_expert_gate": True},
        {"expert_gate_on_input": True},
        {"expert_backend": "other"},
        {"expert_backend": "other", "shared_expert_gate": True, "mlp_activation": "relu2"},
        {"recomputed": "selective"},
        {"recomputed": "full", "shared_expert_gate": True},
    ],
    ids=[
        "gate", "weights before", "another backend", "another backend with a gate", "experts again", "blocks again",
    ],
)  # fmt: skip
def test_replays_in_all_orders_equal_the_pass_itself(changes, other_backend):
    loss, ids, model = make_loss(n_shared_expert=1, **changes)
    expected = loss(ids, ids)
    expected.backward()
    expected = expected.detach()  # no node of its may be there during a capture
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with side_by_side():
        passes = CudaCapture().passes(loss, ids, ids, add=False)
    for _ in replays(passes):
        assert torch.equal(passes.loss, expected)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert (gradient is None) == (parameter not in passes.gradients)
            assert gradient is None or torch.equal(passes.gradients[parameter], gradient)


@pytest.mark.parametrize("gated", [False, True])
def test_a_pass_without_gradients_waits_for_its_parts(gated):
    """Few tokens have a kernel of their own."""
    _, ids, model = make_loss(n_shared_expert=1, shared_expert_gate=gated)
    with torch.no_grad():
        expected = model(ids[:1, :8])
        graph, found = captured(lambda: model(ids[:1, :8]))
    for _ in range(3):
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "n_fewer"),
    [
        # Forward, one of four takes longer than what the routed experts do meanwhile: the casts of the shared experts'
        # weights, two products, the activation. Backward four products, the activation, the casts of gradients, and of
        # the routed experts the first weights' gradient. A gate has a product more, and two.
        ({"n_shared_expert": 1}, (3, 7)),
        ({"n_shared_expert": 1, "shared_expert_gate": True}, (4, 9)),
        ({}, (0, 1)),
        ({"bias": True}, (0, 2)),
        # What runs again stays on one stream, both times.
        ({"n_shared_expert": 1, "recomputed": "selective"}, (0, 1)),
    ],
    ids=["shared", "gated", "routed", "biases", "recomputed"],
)
def test_parts_of_a_layer_are_off_the_longest_path(changes, n_fewer):
    """Computations that must be made one after the other, in both passes."""
    loss, ids, _ = make_loss(**changes)
    lengths = []
    for scope in (contextlib.nullcontext, side_by_side):
        with scope():
            passes = CudaCapture().passes(loss, ids, ids, add=False)
        lengths.append([capture.graph_of(run.__self__).longest_path for run in (passes.forward, passes.backward)])
    one_stream, abreast = lengths
    assert [a - b for a, b in zip(one_stream, abreast, strict=True)] == list(n_fewer)
