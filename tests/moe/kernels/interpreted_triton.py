"""The Triton kernels on a CPU, by Triton's interpreter: not collected by itself, `tests/test_triton.py` runs it.

The interpreter must be switched on before Triton is imported, and imports nothing of LitGPT, to be there quickly.
"""

import contextlib
import os
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels import plan
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights
from litgpt_moe_ext.moe.kernels.operators.shared import GatedSum, Glu, add_gated, glu
from litgpt_moe_ext.moe.kernels.plan import Outer, Product, plan_of
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights
from litgpt_moe_ext.moe.kernels.triton.biases import add_biases
from litgpt_moe_ext.moe.kernels.triton.decoding import decode
from litgpt_moe_ext.moe.kernels.triton.rows import multiply_rows
from litgpt_moe_ext.moe.kernels.triton.weights import sum_outer_products
from litgpt_moe_ext.moe.routing.router import Routing
from tests.moe.gradients import exact, run
from tests.subsets import soon

EXAMPLES = int(os.environ.get("TRITON_EXAMPLES", "3"))
# Between them and the other tests, whose experts are `swiglu`, the first ones have everything.
SOON = [("clamped_swiglu", "none"), ("geglu", "tanh"), ("gelu", "none"), ("relu2", "none")]
LATER = [("swiglu", "none"), ("geglu", "none"), ("gelu", "tanh"), ("relu", "none")]
ACTIVATIONS = SOON + LATER


def make_experts(dtype=torch.float32, E=5, D=16, F=24, bias=True, activation=("swiglu", "none"), **changes):
    config = {"n_expert": E, "n_embd": D, "moe_intermediate_size": F, "bias": bias, "n_layer": 2}
    config |= {"mlp_activation": activation[0], "gelu_approximate": activation[1], "expert_dropout": None}
    config |= {"expert_gate_on_input": None}
    experts = Experts(SimpleNamespace(**config | {"expert_backend": "triton"} | changes))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def make_routing(T, K, E, only=None):
    allowed = torch.arange(E) if only is None else torch.tensor(only)
    experts = torch.stack([allowed[torch.randperm(len(allowed))[:K]] for _ in range(T)]) if T else torch.empty(0, K)
    experts = experts.long()
    return Routing(torch.rand(T, K), experts, torch.bincount(experts.flatten(), minlength=E))


def error(ours, truth):
    return (ours.double() - truth).abs().max().item() / max(1.0, truth.abs().max().item()) if truth.numel() else 0.0


def compare(experts, routing, T):
    x, upstream = (torch.randn(T, experts.n_embd).to(experts.down_proj.dtype) for _ in range(2))
    truth = exact(experts, x, routing, upstream)
    ours, loop = (run(experts, backend, x, routing, upstream) for backend in ("triton", "loop"))
    # Two units in the last place of float16, to which hidden values are rounded on the way. The interpreter cuts
    # bfloat16 off where a card rounds, which adds up over the products of a layer.
    floor = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}[x.dtype]
    for name, expected in truth.items():
        assert ours[name].dtype == loop[name].dtype, name
        assert ours[name].shape == loop[name].shape, name
        assert error(ours[name], expected) <= max(1.5 * error(loop[name], expected), floor), name
    return ours


@pytest.mark.parametrize(
    ("T", "K", "E", "only", "D", "F"),
    [
        pytest.param(33, 2, 5, None, 16, 24, marks=pytest.mark.slow),
        (1, 2, 5, None, 16, 24),
        (9, 2, 5, [0, 4], 16, 24),
        (7, 1, 1, None, 33, 35),
        (0, 2, 2, None, 16, 24),
        pytest.param(80, 1, 2, None, 40, 20, marks=pytest.mark.slow),
    ],
    ids=["batch", "one token", "idle experts", "one expert, odd widths", "no token", "many"],
)
def test_equals_the_loop(T, K, E, only, D, F):
    experts = make_experts(E=E, D=D, F=F, bias=T != 80)
    ours = compare(experts, make_routing(T, K, E, only), T)
    for e in set(range(E)).difference(only or range(E)):
        assert not ours["gate_up_proj"][e].any()
        assert not ours["down_bias"][e].any()


@given(
    T=st.integers(0, 30), E=st.integers(1, 7), k=st.integers(1, 4), D=st.integers(1, 36), F=st.integers(1, 36),
    bias=st.booleans(), activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(T, E, k, D, F, bias, activation, seed, dtype):
    torch.manual_seed(seed)
    compare(make_experts(dtype, E, D, F, bias, activation), make_routing(T, min(k, E), E), T)


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kernels", "operators"])
@pytest.mark.parametrize("activation", [*SOON, *(pytest.param(a, marks=pytest.mark.slow) for a in LATER)], ids="-".join)
def test_activations(activation, known, monkeypatch):
    """Those that the kernels do not know are computed by torch's operators."""
    if not known:
        monkeypatch.setattr(plan, "KINDS", {"identity": "identity"})
        # Whose results may lie in memory in any order.
        compute = Activation.__call__
        monkeypatch.setattr(Activation, "__call__", lambda self, h: compute(self, h).mT.contiguous().mT)
    experts, routing = make_experts(E=1, D=5, F=6, activation=activation), make_routing(9, 1, 1)
    if activation[0] == "clamped_swiglu":
        experts.gate_up_proj.data *= 20  # some past every limit
    compare(experts, routing, 9)
    x = torch.randn(9, 5)
    with torch.no_grad():
        outputs = []
        for experts.forced_backend in ("triton", "loop"):
            outputs.append(experts(x, routing))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", soon([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if "glu" in a[0]], ids="-".join)
def test_projections_that_are_apart(activation, dtype):
    """As shared experts have them: as good as float64, rounded once. Side by side in one tensor they are the same."""
    for shape in ((3, 700), (5, 33), (0, 8)):
        inputs = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2)]
        exactly = [x.detach().double().requires_grad_() for x in inputs]
        upstream = torch.randn(shape).to(dtype)
        ours, truth = glu(Glu(*inputs, *activation)), Activation(*activation).gate(*exactly)
        gradients = torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(truth, exactly, upstream.double())
        inside = (exactly[0] != 7.0) & (exactly[1].abs() != 7.0)  # on a limit itself both slopes are right
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[dtype]
        for a, b in zip((ours, *gradients[0]), (truth, *gradients[1]), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a[inside].double(), b[inside], atol=1e-5, rtol=tolerance)
        joined = torch.cat(inputs, 1).detach().requires_grad_()
        together = glu(Glu(joined, None, *activation))
        assert torch.equal(together, ours)
        assert torch.equal(torch.autograd.grad(together, joined, upstream)[0], torch.cat(gradients[0], 1))


@pytest.mark.slow
def test_torch_takes_the_operator_of_shared_experts():
    inputs = [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
    for up in (inputs[1], None):
        torch.library.opcheck(torch.ops.litgpt_moe_ext.glu.default, (inputs[0], up, "swiglu", "none"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_decoding_reads_only_the_chosen_experts(dtype, bias):
    """Weights of the others are not numbers at all."""
    experts, routing = make_experts(dtype, E=6, bias=bias), make_routing(3, 2, 6, only=[1, 2, 4])
    x = torch.randn(3, 16).to(dtype)
    with torch.no_grad():
        experts.forced_backend = "loop"
        expected = experts(x, routing)
        for parameter in experts.parameters():
            parameter[[0, 3, 5]] = float("nan")
        experts.forced_backend = "triton"
        ours = experts(x, routing)
    assert ours.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_dropout():
    """With the mask that was drawn, everything is what float64 gives."""
    T, K, E, F, p = 12, 2, 2, 24, 0.25
    experts, routing = make_experts(E=E, F=F, expert_dropout=p), make_routing(T, K, E)
    x, upstream = torch.randn(T, 16), torch.randn(T, 16)
    torch.manual_seed(5)
    ours = run(experts, "triton", x, routing, upstream)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(experts(x, routing), ours["y"])
    torch.manual_seed(5)
    keep_RF = torch.empty(T * K, F, dtype=torch.bool).bernoulli_(1 - p)
    assert 0.6 < keep_RF.float().mean() < 0.9
    rows = routing.experts_TK.flatten().argsort(stable=True)
    leaves = [x, routing.weights_TK, *(parameter.detach() for parameter in experts.parameters())]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    x, gates, up, down, up_bias, down_bias = leaves
    chosen = routing.experts_TK.flatten()[rows]
    h = torch.einsum("rd,rgd->rg", x[rows // K], up[chosen]) + up_bias[chosen]
    a = experts.activation(h) * keep_RF / (1 - p)
    y = (torch.einsum("rf,rdf->rd", a, down[chosen]) + down_bias[chosen]) * gates.flatten()[rows].unsqueeze(1)
    y = torch.zeros(T, 16, dtype=torch.float64).index_add(0, rows // K, y)
    gradients = torch.autograd.grad(y, leaves, upstream.double())
    names = ("x", "gates", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    for name, expected in zip(("y", *names), (y.detach(), *gradients), strict=True):
        torch.testing.assert_close(ours[name].double(), expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    experts, routing = make_experts(torch.bfloat16, E=2), make_routing(17, 2, 2)
    x, upstream = torch.randn(17, 16).bfloat16(), torch.randn(17, 16).bfloat16()
    first, second = (run(experts, "triton", x, routing, upstream) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_autocast(dtype):
    """Products in the lower precision; sums over experts and the gradients of weights in float32."""
    experts, routing = make_experts(E=2), make_routing(9, 2, 2)
    x, upstream = torch.randn(9, 16), torch.randn(9, 16)
    truth = exact(experts, x, routing, upstream)
    with torch.autocast("cpu", dtype):
        ours = run(experts, "triton", x, routing, upstream)
    for name, expected in truth.items():
        assert ours[name].dtype == torch.float32
        assert not torch.equal(ours[name], ours[name].to(dtype).float()), f"{name} has passed through {dtype}"
        assert 1e-7 < error(ours[name], expected) < {torch.float16: 3e-3, torch.bfloat16: 4e-2}[dtype], name


@pytest.mark.parametrize(
    ("backend", "dtype", "autocast"),
    [
        ("triton", torch.float32, torch.bfloat16),
        ("grouped_mm", torch.float32, torch.bfloat16),
        pytest.param("triton", torch.float32, None, marks=pytest.mark.slow),
        pytest.param("triton", torch.float16, None, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_share_weights(backend, dtype, autocast):
    """Every bit is as without sharing, also where a hook watches one of the weights."""
    F = 24 if backend == "grouped_mm" else 23
    experts, routing = make_experts(dtype, E=2, F=F, bias=False, expert_backend=backend), make_routing(5, 1, 2)
    xs, upstream, seen = torch.randn(2, 5, 16).to(dtype), torch.randn(5, 16).to(dtype), []

    def gradients(shared):
        experts.zero_grad()
        for x in xs:
            with shared(), torch.autocast("cpu", autocast, enabled=autocast is not None):
                y = experts(x, routing)
                before = experts.down_proj.grad
                y.backward(upstream)
            assert before is None or before is experts.down_proj.grad
        return [parameter.grad for parameter in experts.parameters()]

    weights = StepWeights()
    expected, first = gradients(contextlib.nullcontext), gradients(weights.shared)
    assert weights.size == (0 if autocast is None else 2 * sum(p.numel() for p in experts.parameters()))
    weights.keep()
    weights.refresh()
    ours = gradients(weights.shared)
    handle = experts.gate_up_proj.register_hook(lambda gradient: seen.append(gradient))
    watched = gradients(weights.shared)
    handle.remove()
    assert len(seen) == 2
    for some in zip(expected, first, ours, watched, strict=True):
        assert all(torch.equal(some[0], gradient) for gradient in some)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [("x",), ("gates",), ("gate_up_proj",), ("down_bias",), ("gate_up_bias", "x")])
def test_frozen_parts_get_no_gradient(trained):
    experts, routing = make_experts(E=2), make_routing(9, 1, 2)
    tensors = {"x": torch.randn(9, 16), "gates": routing.weights_TK, **dict(experts.named_parameters())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    results = []
    for experts.forced_backend in ("triton", "loop"):
        y = experts(tensors["x"], routing)
        results.append(torch.autograd.grad(y.square().sum(), [tensors[name] for name in trained]))
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("apart", [2**30 + 32, 2**31 + 64])
def test_more_than_two_billion_elements(apart):
    """Experts lie so many elements apart that the third is past 2**31, and so do rows; used pages become memory."""
    memory = torch.empty(2 * apart + 4096, dtype=torch.float16)
    if not memory.numel():
        pytest.skip("no room")

    def far(start, *shape):
        strides = (apart, *torch.empty(shape[1:], device="meta").stride())
        return memory.as_strided(shape, strides, start).copy_(torch.randn(shape))

    weight, x, total = far(0, 3, 8, 8), far(1024, 3, 8), far(2048, 3, 8, 8)
    rows, ends = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3], dtype=torch.int32)
    y = multiply_rows(Product(x, weight, None, plan_of(rows, ends, 3), gather=True))
    torch.testing.assert_close(y, torch.einsum("ri,roi->ro", x.float(), weight.float()).half(), atol=1e-2, rtol=1e-2)
    outer, expected = Outer(x, x, plan_of(rows, ends, 3), gather_left=True), torch.einsum("ro,ri->roi", x, x)
    torch.testing.assert_close(sum_outer_products(outer, torch.float32).half(), expected)
    expected += total
    sum_outer_products(outer, torch.float16, total)
    torch.testing.assert_close(total, expected, atol=1e-2, rtol=1e-2)
    weights, experts = ExpertWeights(weight, None, weight, None), rows.unsqueeze(1)
    ours = decode(x, torch.ones(3, 1), experts, weights, Activation("relu"))
    a = torch.einsum("roi,ri->ro", weight.float(), x.float()).relu()
    expected = torch.einsum("roi,ri->ro", weight.float(), a)
    torch.testing.assert_close(ours.float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_past_two_billion_elements(transposed):
    """Its outputs, or its inputs, lie far apart in memory."""
    memory = torch.empty(2**31 + 4096, dtype=torch.float16)
    weight = memory.as_strided((1, 3, 3), (9, 2**30 + 32, 1)).copy_(torch.randn(1, 3, 3))
    weight, x = weight.mT if transposed else weight, torch.randn(2, 3).half()
    plan = plan_of(torch.arange(2), torch.tensor([2], dtype=torch.int32), 2)
    expected = x.float() @ weight[0].float().T
    torch.testing.assert_close(multiply_rows(Product(x, weight, None, plan)).float(), expected, atol=1e-2, rtol=1e-2)
    if not transposed:
        gates, experts, other = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.eye(3).half().unsqueeze(0)
        ours = decode(x, gates, experts, ExpertWeights(weight, None, other, None), Activation("relu"))
        torch.testing.assert_close(ours.float(), expected.relu(), atol=1e-2, rtol=1e-2)


def test_decoding_takes_any_strides():
    weights = ExpertWeights(torch.randn(4, 48, 16), None, torch.randn(4, 16, 24), None)
    inputs = torch.randn(3, 16), torch.rand(3, 2), torch.randint(0, 4, (3, 2))
    expected = decode(*inputs, weights, Activation("swiglu"))
    assert torch.equal(decode(*[x.T.contiguous().T for x in inputs], weights, Activation("swiglu")), expected)


def saved_bytes(experts, x, routing):
    known = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = experts(x, routing)
    return sum(storages.values()) if y is not None else 0


def test_saved_for_the_backward_pass():
    """Tokens, the first projection's output and the routing, as on a CPU; no gathered copy, no cast weights."""
    T, K, D, F = 40, 2, 16, 24
    experts, routing = make_experts(), make_routing(T, K, 5)
    routing.weights_TK.requires_grad_()
    ours = saved_bytes(experts, torch.randn(T, D), routing)
    assert ours <= 4 * (T * D + T * K * 2 * F) + 20 * T * K + 64
    experts.forced_backend = "grouped_cpu"
    ends_of_experts = 4 * 5
    assert ours - ends_of_experts <= saved_bytes(experts, torch.randn(T, D), routing)


def assert_same(use, experts, routing):
    """Hold a use of experts against their own outputs and gradients."""
    x, upstream = torch.randn(12, 8), torch.randn(12, 8)
    plain = run(experts, "triton", x, routing, upstream)
    leaf = x.clone().requires_grad_()
    experts.zero_grad()
    y = use(leaf)
    y.backward(upstream)
    assert torch.equal(y, plain["y"])
    for ours, name in ((leaf.grad, "x"), (experts.gate_up_proj.grad, "gate_up_proj")):
        torch.testing.assert_close(ours, plain[name])


@pytest.mark.slow
def test_checkpointing_sees_operators():
    experts, routing = make_experts(D=8, F=8, E=3), make_routing(12, 2, 3)
    assert_same(lambda leaf: checkpoint(lambda x: experts(x, routing), leaf, use_reentrant=False), experts, routing)


@pytest.mark.slow
def test_compiling_sees_operators():
    from torch._dynamo.backends.common import aot_autograd

    experts, routing, graphs = make_experts(D=8, F=8, E=3), make_routing(12, 2, 3), []

    def remember(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=remember))
    assert_same(lambda leaf: compiled(leaf, routing), experts, routing)
    operators = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert {"litgpt_moe_ext.expert_up.default", "litgpt_moe_ext.expert_down.default"} <= operators
    assert "litgpt_moe_ext.sum_outer_products.default" in operators


def test_flops_are_those_of_the_active_rows():
    T, K, D, F = 7, 2, 16, 24
    experts, routing = make_experts(E=2, bias=False), make_routing(T, K, 2)
    forward = T * K * 3 * 2 * D * F
    with FlopCounterMode(display=False) as counter:
        y = experts(torch.randn(T, D, requires_grad=True), routing)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    few = Routing(*(t[:3] for t in routing[:2]), torch.bincount(routing.experts_TK[:3].flatten(), minlength=2))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        experts(torch.randn(3, D), few)
    assert counter.get_total_flops() == 3 * K * 3 * 2 * D * F


@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_padding_is_computed_by_no_expert(watch, backend):
    """What other tokens give and get is as without padding, which gets no gradient whatever memory its rows have."""
    watch.reads_unwritten = True
    T, K, E = 14, 2, 3
    experts, whole = make_experts(E=E), make_routing(T, K, E)
    real_T = torch.rand(T) < 0.6
    x, upstream = torch.randn(T, 16), torch.randn(T, 16)
    nowhere_TK = whole.experts_TK.masked_fill(~real_T.unsqueeze(1), E)
    counts_E = torch.bincount(nowhere_TK.flatten(), minlength=E + 1)[:E]
    padded = Routing(whole.weights_TK, nowhere_TK, counts_E, real_T)
    results = run(experts, backend, x, padded, upstream)
    text = Routing(whole.weights_TK[real_T], whole.experts_TK[real_T], counts_E)
    expected = run(experts, "loop", x[real_T], text, upstream[real_T])
    assert not results["x"][~real_T].any()
    for name in ("y", "x", "gates"):
        results[name] = results[name][real_T]
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
    experts.forced_backend = backend
    with torch.no_grad():
        counts_E = torch.bincount(nowhere_TK[:4].flatten(), minlength=E + 1)[:E]
        few = Routing(whole.weights_TK[:4], nowhere_TK[:4], counts_E, real_T[:4])
        torch.testing.assert_close(experts(x[:4], few)[real_T[:4]], results["y"][: int(real_T[:4].sum())])


@given(
    R=st.integers(0, 40), width=st.integers(1, 600), E=st.integers(1, 9), scatter=st.booleans(), padded=st.booleans()
)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_biases_of_rows(R, width, E, scatter, padded):
    """As torch adds them beside its own products; rows of padding have none."""
    y, bias, expert = torch.randn(R, width), torch.randn(E, width), torch.randint(0, E + padded, (R,)).sort().values
    ends, rows = torch.bincount(expert, minlength=E)[:E].cumsum(0, dtype=torch.int32), torch.randperm(R)
    expected = y + torch.cat([bias, torch.zeros(1, width)])[expert]
    if scatter:
        expected = torch.empty_like(y).index_copy_(0, rows, expected)
    assert torch.equal(add_biases(y, bias, plan_of(rows, ends, R), scatter), expected)


@pytest.mark.parametrize("gated", [False, True])
@given(T=st.integers(0, 20), D=st.integers(1, 600), dtype=st.sampled_from([torch.float32, torch.float16]),
       padded=st.booleans())  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_a_sum_with_shared_experts(gated, T, D, dtype, padded):
    """Against float64, with gradients; padding, whose numbers are none, gives 0 and gets 0."""
    real = torch.rand(T) < 0.5 if padded else None
    inputs = [torch.randn(T, width).to(dtype) for width in ((D, D, 1) if gated else (D, D))]
    upstream, nowhere = torch.randn(T, D).to(dtype), ~real if padded else torch.zeros(T, dtype=torch.bool)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = exact[0] + (exact[1] * exact[2].sigmoid() if gated else exact[1])
    expected = expected.masked_fill(nowhere.unsqueeze(1), 0.0)
    expected.backward(upstream.double())
    ours = [x.masked_fill(nowhere.unsqueeze(1), float("nan")).requires_grad_() for x in inputs]
    result = add_gated(GatedSum(*ours, real) if gated else GatedSum(*ours, None, real))
    result.backward(upstream)
    for value, truth in ((result, expected), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), truth, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


def test_second_derivatives_are_refused():
    """Torch would leave out what goes through a kernel."""
    experts, routing = make_experts(), make_routing(9, 2, 5)
    x = torch.randn(9, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(experts(x, routing).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient, so what uses it cannot be differentiated twice"):
        gradient.sum().backward()


def test_meta_tensors():
    """Operators know the shapes of their results without computing them."""
    from litgpt_moe_ext.moe.kernels.calls import Hidden
    from litgpt_moe_ext.moe.kernels.grouped import triton_experts

    with torch.device("meta"):
        weights = ExpertWeights(torch.empty(5, 48, 16), None, torch.empty(5, 16, 24), None)
        weights.up_EGD.requires_grad_()
        routing = Routing(torch.empty(40, 2), torch.empty(40, 2, dtype=torch.int64), torch.empty(5, dtype=torch.int64))
        x = torch.empty(40, 16, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            y = triton_experts(x, routing, weights, Hidden(Activation("swiglu")))
            y.float().sum().backward()
    assert y.shape == (40, 16)
    assert y.dtype == torch.bfloat16
    assert weights.up_EGD.grad.shape == (5, 48, 16)
    # Forward, and backward without the gradients of tokens and of the second projection's weights.
    up, down = 40 * 2 * 2 * 16 * 48, 40 * 2 * 2 * 16 * 24
    assert counter.get_total_flops() == up + down + down + up
