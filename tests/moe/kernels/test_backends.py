"""Every fast way of computing the experts against the plain loop: outputs and all gradients."""

import contextlib
import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.moe.activations import Activation, Pointwise
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels import cpu, native
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights, Hidden
from litgpt_moe_ext.moe.kernels.cpu import dispatch, grouped_cpu_experts
from litgpt_moe_ext.moe.kernels.few_rows import gather_experts
from litgpt_moe_ext.moe.kernels.grouped import grouped_mm_experts
from litgpt_moe_ext.moe.kernels.plan import sort_rows
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.moe.registry import ACTIVATIONS, ActivationType
from litgpt_moe_ext.moe.routing.router import Routing
from tests.models import moe_config, randomize

grouped_mm = torch.nn.functional.grouped_mm
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


def make_experts(dtype=torch.float64, n_expert=5, D=16, F=24, bias=True, **settings):
    sizes = {"n_expert": n_expert, "n_embd": D, "moe_intermediate_size": F}
    config = moe_config(**sizes, n_expert_per_token=1, bias=bias, **settings)
    return randomize(Experts(config), std=0.3).to(dtype)


def make_routing(T, K, E, dtype=torch.float32, only=None):
    """Choose K experts for each of T tokens, from the experts in `only` if given."""
    allowed = torch.arange(E) if only is None else torch.tensor(only)
    experts = torch.stack([allowed[torch.randperm(len(allowed))[:K]] for _ in range(T)]) if T else torch.empty(0, K)
    experts = experts.long()
    return Routing(torch.rand(T, K, dtype=dtype), experts, torch.bincount(experts.flatten(), minlength=E))


def run(experts, backend, x, routing, upstream, scope=contextlib.nullcontext):
    """Return the output and the gradients of everything that has one."""
    experts.forced_backend = backend
    experts.zero_grad()
    x = x.detach().requires_grad_()
    routing = routing._replace(weights_TK=routing.weights_TK.detach().requires_grad_())
    with scope():
        y = experts(x, routing)
    y.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": routing.weights_TK.grad, **gradients}


def assert_same(ours, loop, tolerance):
    assert ours.keys() == loop.keys()
    for name, expected in loop.items():
        assert ours[name].dtype == expected.dtype, name
        # Relative to the largest entry: sums of many terms cancel.
        atol = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(ours[name], expected, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def compare(experts, routing, dtype, backend="grouped_cpu", scope=contextlib.nullcontext, tolerance=None, x=None):
    T, D = routing.experts_TK.size(0), experts.n_embd
    x = torch.randn(T, D, dtype=dtype) if x is None else x
    upstream = torch.randn(T, D, dtype=dtype)
    ours = run(experts, backend, x, routing, upstream, scope)
    loop = run(experts, "loop", x, routing, upstream, scope)
    assert_same(ours, loop, tolerance or EXACT[dtype])
    return ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "K", "E", "only"),
    [
        (33, 2, 5, None),
        (1, 2, 5, None),
        (7, 1, 1, None),
        (12, 3, 3, None),
        (20, 1, 5, [3]),
        (20, 2, 5, [0, 4]),
        (300, 2, 3, None),
        (0, 2, 5, None),
    ],
    ids=["batch", "one token", "one expert", "all experts", "one takes all", "idle experts", "many", "no token"],
)
def test_grouped_cpu_equals_the_loop(T, K, E, only, dtype, bias):
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    experts = make_experts(dtype, n_expert=E, bias=bias)
    ours = compare(experts, make_routing(T, K, E, weights_dtype, only), dtype)
    for e in set(range(E)).difference(only or range(E)):
        assert not ours["gate_up_proj"][e].any()
        assert not ours["down_proj"][e].any()


@given(
    T=st.integers(0, 70), E=st.integers(1, 9), k=st.integers(1, 9), D=st.integers(1, 20), F=st.integers(1, 20),
    bias=st.booleans(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape(T, E, k, D, F, bias, dtype, seed):
    torch.manual_seed(seed)
    config = moe_config(n_expert=E, n_expert_per_token=1, n_embd=16, moe_intermediate_size=F, bias=bias)
    config.n_embd = D
    experts = randomize(Experts(config), std=0.3).to(dtype)
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    compare(experts, make_routing(T, min(k, E), E, weights_dtype), dtype)


@pytest.mark.parametrize("name", ["swiglu", "relu2"])
def test_wide_experts(name):
    experts = make_experts(D=8, F=3000, n_expert=2, mlp_activation=name)
    compare(experts, make_routing(90, 1, 2, torch.float64), torch.float64)


@pytest.mark.parametrize("backend", ["grouped_cpu", "grouped_mm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"mlp_activation": "geglu"},
        {"mlp_activation": "geglu", "gelu_approximate": "tanh"},
        {"mlp_activation": "gelu"},
        {"mlp_activation": "gelu", "gelu_approximate": "tanh"},
        {"mlp_activation": "relu"},
        {"mlp_activation": "relu2"},
        {"mlp_activation": "clamped_swiglu"},
    ],
    ids=str,
)
def test_activations(settings, backend):
    dtype = torch.float64 if backend == "grouped_cpu" else torch.float32
    experts = make_experts(dtype, **settings)
    compare(experts, make_routing(33, 2, 5, dtype), dtype, backend)
    with FlopCounterMode(display=False):  # with which operators run where autograd records nothing
        compare(experts, make_routing(33, 2, 5, dtype), dtype, backend)


@pytest.mark.parametrize("backend", ["grouped_cpu", "grouped_mm"])
@pytest.mark.parametrize("form", [{}, {"gated": True}, {"gated": True, "up": Pointwise(torch.tanh)}], ids="+".join)
def test_registered_activations(monkeypatch, form, backend):
    """Of which nothing is known but the function: autograd gives its slope."""
    monkeypatch.setitem(ACTIVATIONS, "own", ActivationType(Pointwise(F.mish), **form))
    dtype = torch.float64 if backend == "grouped_cpu" else torch.float32
    compare(make_experts(dtype, mlp_activation="own"), make_routing(33, 2, 5, dtype), dtype, backend)


@pytest.mark.parametrize("dtype", list(EXACT))
def test_gates_on_inputs(dtype):
    """Float32 gate values make no wider rows of narrow ones."""
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    experts = make_experts(dtype, expert_gate_on_input=True)
    compare(experts, make_routing(33, 2, 5, weights_dtype), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "T"), [(torch.float64, 40), (torch.bfloat16, 200)], ids=["exact", "padded segments"])
def test_dropout_of_hidden_activations(dtype, T, bias):
    """Both draw their masks from the same generator in the same order."""
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    experts, routing = make_experts(dtype, bias=bias, expert_dropout=0.4), make_routing(T, 2, 5, weights_dtype)
    x, upstream = torch.randn(T, 16, dtype=dtype), torch.randn(T, 16, dtype=dtype)
    results = []
    for backend in ("grouped_cpu", "loop"):
        torch.manual_seed(7)
        results.append(run(experts, backend, x, routing, upstream))
    assert_same(*results, EXACT[dtype])
    torch.manual_seed(8)
    assert not torch.equal(run(experts, "loop", x, routing, upstream)["y"], results[1]["y"])
    experts.eval()
    assert_same(*(run(experts, b, x, routing, upstream) for b in ("grouped_cpu", "loop")), EXACT[dtype])


@pytest.mark.parametrize("experts_TK", [[[3, 0]], [[3, 0], [0, 1]]], ids=["one token", "two tokens"])
def test_dropout_drops_the_same_without_gradients(experts_TK):
    """Reentrant checkpointing runs a layer first without gradients, and takes those of a second run."""
    experts, outputs = make_experts(expert_dropout=0.4), []
    experts.forced_backend = "grouped_cpu"
    chosen = torch.tensor(experts_TK)
    routing = Routing(torch.rand(chosen.shape).double(), chosen, torch.bincount(chosen.flatten(), minlength=5))
    x = torch.randn(len(chosen), 16, dtype=torch.float64)
    for learns in (False, True):
        torch.manual_seed(7)
        with torch.set_grad_enabled(learns):
            outputs.append(experts(x, routing).detach())
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("backend", ["loop", "grouped_cpu", "grouped_mm"])
def test_dropout_keeps_the_mean(backend):
    """A hidden activation is dropped with the given probability, and the others make up for it."""
    experts = make_experts(
        torch.float32, D=16, F=4096, n_expert=1, bias=False, expert_dropout=0.25, mlp_activation="relu"
    )
    with torch.no_grad():
        experts.up_proj.fill_(1.0)
        experts.down_proj.fill_(1 / 4096)
    routing = Routing(torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.int64), torch.tensor([64]))
    experts.forced_backend = backend
    y = experts(torch.full((64, 16), 1 / 16), routing)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    # The mean of 4096 values that are 0 or 4/3.
    assert y[:, 0].std().item() == pytest.approx((0.25 * 0.75) ** 0.5 / 0.75 / 64, rel=0.5)


@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize("T", [1, 2, 5])
def test_decoding_a_few_tokens(T, dtype):
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for bias in (False, True):
        experts, routing = make_experts(dtype, bias=bias), make_routing(T, 2, 5, weights_dtype)
        x = torch.randn(T, 16, dtype=dtype)
        with torch.no_grad():
            experts.forced_backend = "grouped_cpu"
            ours = experts(x, routing)
            experts.forced_backend = "loop"
            assert_same({"y": ours}, {"y": experts(x, routing)}, EXACT[dtype])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_other_matmul_precisions(precision):
    """They pad segments in float32 too, and on CPUs with AMX "medium" multiplies in bfloat16."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        compare(make_experts(torch.float32), make_routing(37, 2, 5), torch.float32, tolerance=0.03)
    finally:
        torch.set_float32_matmul_precision(before)


def test_padding_rows_leave_no_trace():
    """Each expert alone, without neighbours whose rows could pad it, gives the same gradients."""
    experts = make_experts(torch.bfloat16, n_expert=2)
    x, upstream = torch.randn(40, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    chosen = (torch.arange(40) % 2).view(-1, 1)
    weights = torch.rand(40, 1)
    both = run(experts, "grouped_cpu", x, Routing(weights, chosen, torch.tensor([20, 20])), upstream)
    for e in range(2):
        rows = chosen[:, 0] == e
        counts = torch.tensor([20, 0]) if e == 0 else torch.tensor([0, 20])
        alone = run(experts, "grouped_cpu", x[rows], Routing(weights[rows], chosen[rows], counts), upstream[rows])
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            torch.testing.assert_close(both[name][e], alone[name][e])
        torch.testing.assert_close(both["x"][rows], alone["x"])


def test_what_would_overflow_in_another_expert():
    """Tokens of the second expert are too large for the first, whose rows end in padding."""
    experts, first = make_experts(torch.float16, n_expert=2), torch.arange(41) < 21
    x, upstream = torch.randn(2, 41, 16).half()
    with torch.no_grad():
        x[~first] *= 200
        experts.gate_up_proj[0] *= 30
        experts.gate_up_proj[1] *= 0.05
    routing = Routing(torch.rand(41, 1), (~first).long().unsqueeze(1), torch.tensor([21, 20]))
    for name, value in run(experts, "grouped_cpu", x, routing, upstream).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("E", [255, 256, 257, 2**15, 40_000])
def test_rows_of_many_experts_are_in_order(E, padded):
    """As many as a byte holds, and two bytes; padding, whose expert is E, comes last."""
    experts_TK = torch.randint(0, E + padded, (300, 4), generator=torch.Generator().manual_seed(E))
    experts_TK[:2, 0] = torch.tensor([E - 1, E if padded else 0])
    counts_E = experts_TK.flatten().bincount(minlength=E + 1)[:E]
    rows_R, ends_E = sort_rows(experts_TK, counts_E, padded)
    assert torch.equal(rows_R, experts_TK.flatten().sort(stable=True).indices)
    assert torch.equal(ends_E, counts_E.cumsum(0).int())


def test_dispatch_by_hand():
    experts = torch.tensor([[2, 0], [0, 2], [2, 3]])
    plan = dispatch(experts, torch.tensor([2, 0, 3, 1]), padding=4)
    assert [tuple(segment) for segment in plan.segments] == [(0, 0, 2, 4), (2, 2, 5, 6), (3, 5, 6, 9)]
    assert plan.tokens_R.tolist() == [0, 1, 0, 1, 2, 2]
    assert plan.n_row == 9
    assert plan.positions_TK.tolist() == [[2, 0], [1, 3], [4, 5]]


def test_gradcheck():
    experts = make_experts(n_expert=3, D=4, F=3)
    routing = make_routing(5, 2, 3, torch.float64, only=[0, 2])

    def function(x, weights, *parameters):
        return grouped_cpu_experts(
            x, routing._replace(weights_TK=weights), ExpertWeights(*parameters), Hidden(Activation("swiglu"))
        )

    parameters = (experts.gate_up_proj, experts.gate_up_bias, experts.down_proj, experts.down_bias)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, routing.weights_TK.requires_grad_(), *parameters))


def test_strided_inputs_and_gradients():
    experts, routing = make_experts(), make_routing(9, 2, 5, torch.float64)
    compare(experts, routing, torch.float64, x=torch.randn(16, 18, dtype=torch.float64)[:, ::2].T)
    experts.forced_backend = "grouped_cpu"
    experts.zero_grad()
    experts(torch.randn(9, 16, dtype=torch.float64), routing).sum().backward()
    assert experts.down_bias.grad.abs().sum() > 0


def test_gradients_accumulate():
    experts, routing, upstream = make_experts(), make_routing(9, 2, 5, torch.float64), torch.ones(9, 16).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    once = run(experts, "grouped_cpu", x, routing, upstream)["gate_up_proj"].clone()
    experts(x, routing).backward(upstream)
    torch.testing.assert_close(experts.gate_up_proj.grad, 2 * once)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    moe = randomize(SharedExpertMoE(moe_config(bias=True)).double(), std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(moe(x).square().sum(), [x, *moe.parameters()])
    moe.zero_grad()
    x.grad = None
    checkpoint(moe, x, use_reentrant=use_reentrant).square().sum().backward()
    for expected, tensor in zip(plain, [x, *moe.parameters()], strict=True):
        assert torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, bias):
    """Products in the lower precision, sums over experts and all gradients in float32, as in the loop."""
    experts = make_experts(torch.float32, bias=bias)
    routing = make_routing(37, 2, 5)
    ours = compare(experts, routing, torch.float32, scope=lambda: torch.autocast("cpu", dtype), tolerance=EXACT[dtype])
    assert {value.dtype for value in ours.values()} == {torch.float32}
    exact = run(experts, "loop", torch.randn(37, 16), routing, torch.randn(37, 16))
    assert not torch.equal(exact["y"], ours["y"])


@pytest.mark.parametrize("backend", [None, "loop", "grouped_cpu"])
def test_autocast_leaves_float64_alone(backend):
    """As torch's own layers, which would refuse float64 weights beside what has been cast."""
    layer = randomize(SharedExpertMoE(moe_config(n_shared_expert=1, expert_backend=backend))).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode):
    experts, routing = make_experts(), make_routing(9, 2, 5, torch.float64)
    x = torch.randn(9, 16, dtype=torch.float64)
    experts.forced_backend = "loop"
    expected = experts(x, routing).detach()
    experts.forced_backend = "grouped_cpu"
    with mode():
        y = experts(x, routing)
    assert y.grad_fn is None
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


NAMES = ("x", "weights", "gate_up_proj", "gate_up_bias", "down_proj", "down_bias")


@pytest.mark.parametrize("trained", [s for n in (1, 2) for s in itertools.combinations(NAMES, n)], ids="+".join)
def test_frozen_parts_get_no_gradient(trained, monkeypatch):
    """Nor is one computed."""
    passes, backward = [], cpu._backward
    monkeypatch.setattr(cpu, "_backward", lambda *args: passes.append(backward(*args)) or passes[-1])
    experts, routing = make_experts(), make_routing(9, 2, 5, torch.float64)
    tensors = {"x": torch.randn(9, 16, dtype=torch.float64), "weights": routing.weights_TK}
    tensors |= dict(experts.named_parameters())
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    gradients = {}
    for backend in ("loop", "grouped_cpu"):
        experts.forced_backend = backend
        y = experts(tensors["x"], routing._replace(weights_TK=tensors["weights"]))
        gradients[backend] = torch.autograd.grad(y.square().sum(), [tensors[name] for name in trained])
    for ours, loop in zip(gradients["grouped_cpu"], gradients["loop"], strict=True):
        torch.testing.assert_close(ours, loop, atol=1e-12, rtol=1e-12)
    (computed,) = passes
    assert [gradient is not None for gradient in computed] == [name in trained for name in NAMES]


def test_second_derivatives_are_refused():
    experts, routing = make_experts(), make_routing(9, 2, 5, torch.float64)
    experts.forced_backend = "grouped_cpu"
    x = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(experts(x, routing).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_saved_activations():
    """Tokens, one projection and the routing; not the parameters, and not a gathered copy of anything."""
    T, K, D, F = 64, 2, 16, 24
    experts, routing = make_experts(torch.float32), make_routing(T, K, 5)
    routing.weights_TK.requires_grad_()
    parameters = {parameter.data_ptr() for parameter in experts.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(torch.randn(T, D), routing)
    assert sum(saved.values()) <= 4 * (T * D + T * K * 2 * F) + 20 * T * K


@pytest.mark.parametrize("backend", ["grouped_cpu", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_saves_at_most_half_of_what_llama_moe_saves(dtype, backend):
    """Parameters and the input itself left out; coarse experts, where the difference is smallest."""
    from litgpt.model import LLaMAMoE

    def saved_bytes(layer, x):
        known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), x)}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layer(x)
        return sum(storages.values()) if output is not None else 0

    config = moe_config(n_embd=64, moe_intermediate_size=96, n_expert=4)
    x = torch.randn(1, 512, 64, dtype=dtype, requires_grad=True)
    ours = randomize(SharedExpertMoE(config), std=0.1).to(dtype)
    ours.experts.forced_backend = backend
    ours = saved_bytes(ours, x)
    theirs = saved_bytes(randomize(LLaMAMoE(config), std=0.1).to(dtype), x)
    assert ours <= 0.5 * theirs


def test_flops_are_those_of_the_active_rows():
    experts, routing = make_experts(torch.float32, bias=False), make_routing(33, 2, 5)
    x = torch.randn(33, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = experts(x, routing)
    forward = 33 * 2 * 3 * 2 * 16 * 24
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_mm_equals_the_loop(dtype, bias):
    for T, only in ((33, None), (1, None), (20, [0, 4])):
        compare(make_experts(dtype, bias=bias), make_routing(T, 2, 5, only=only), dtype, backend="grouped_mm")


def blackwells_grouped_mm(x, y, offs):
    """Sums over no rows are anything, and operands without columns are refused."""
    if not x.size(-1):
        raise RuntimeError("strides should be multiple of 16 bytes")
    product = grouped_mm(x, y, offs=offs)
    return product if y.dim() == 3 else product.where((offs.diff(prepend=offs.new_zeros(1)) > 0).view(-1, 1, 1), 1e30)


@pytest.mark.parametrize(("T", "only"), [(20, [0, 3]), (0, None)], ids=["empty groups", "no token"])
def test_grouped_mm_of_blackwell(monkeypatch, T, only):
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", blackwells_grouped_mm)
    monkeypatch.setattr(native, "leaves_empty_groups", lambda device: True)
    compare(make_experts(torch.float32), make_routing(T, 2, 5, only=only), torch.float32, "grouped_mm")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_chosen_experts_equal_the_loop(dtype, bias):
    """What a GPU without Triton decodes with."""
    experts, routing = make_experts(dtype, bias=bias), make_routing(3, 2, 5)
    experts.forced_backend = "loop"
    x = torch.randn(3, 16, dtype=dtype)
    with torch.no_grad():
        ours = gather_experts(x, routing, experts.weights, experts.activation, dtype)
        assert_same({"y": ours}, {"y": experts(x, routing)}, EXACT[dtype])


def test_gradients_of_tokens_are_summed_in_float32():
    """Eight gradients of about 1 in bfloat16: added one by one, each sum would be rounded to 1/32."""
    T, K = 64, 8
    upstream = (1 + torch.rand(T * K, 16)).bfloat16()
    summed = native.combine(upstream, None, T, torch.bfloat16)
    assert torch.equal(summed, upstream.view(T, K, 16).float().sum(1).bfloat16())


def test_grouped_mm_under_autocast():
    def scope():
        return torch.autocast("cpu", torch.bfloat16)

    compare(
        make_experts(torch.float32), make_routing(33, 2, 5), torch.float32, "grouped_mm", scope, EXACT[torch.bfloat16]
    )


def test_grouped_mm_never_asks_for_values():
    """On meta tensors there are none."""
    with torch.device("meta"):
        weights = (torch.empty(5, 48, 16), torch.empty(5, 48), torch.empty(5, 16, 24), torch.empty(5, 16))
        routing = (torch.empty(9, 2), torch.empty(9, 2, dtype=torch.int64), torch.empty(5, dtype=torch.int64))
        x = torch.empty(9, 16, dtype=torch.bfloat16)
        y = grouped_mm_experts(x, Routing(*routing), ExpertWeights(*weights), Hidden(Activation("swiglu")))
    assert y.shape == (9, 16)
    assert y.dtype == torch.bfloat16


def test_compiled_without_breaks_or_recompiling():
    moe = randomize(SharedExpertMoE(moe_config(moe_intermediate_size=16)), std=0.3)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 9, 12):
        x = torch.randn(2, tokens, 16)
        torch.testing.assert_close(compiled(x), moe(x), atol=2e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["grouped_cpu", "grouped_mm", "loop"])
def test_padding_may_hold_anything(backend):
    """In bfloat16 a CPU's segments end in rows of padding."""
    T, E = 90, 3
    experts, routing, real_T = make_experts(torch.bfloat16, n_expert=E), make_routing(T, 2, E), torch.rand(T) < 0.6
    nowhere_TK = routing.experts_TK.masked_fill(~real_T.unsqueeze(1), E)
    counts_E = torch.bincount(nowhere_TK.flatten(), minlength=E + 1)[:E]
    padded = Routing(routing.weights_TK * real_T.unsqueeze(1), nowhere_TK, counts_E, real_T)
    x = torch.randn(T, 16, dtype=torch.bfloat16).masked_fill(~real_T.unsqueeze(1), float("nan")).requires_grad_()
    experts.forced_backend = backend
    experts(x, padded)[real_T].sum().backward()
    assert not x.grad[~real_T].any()
    for gradient in (x.grad, *(parameter.grad for parameter in experts.parameters())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["grouped_cpu", "grouped_mm", "loop"])
def test_a_single_token_of_padding_visits_no_expert(backend):
    """The number that it has for an expert is none."""
    experts = make_experts(torch.float32)
    experts.forced_backend = backend
    counts_E, real_T = torch.zeros(5, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    nowhere = Routing(torch.zeros(1, 2), torch.full((1, 2), 5), counts_E, real_T)
    with torch.no_grad():
        assert experts(torch.full((1, 16), float("nan")), nowhere).shape == (1, 16)


@pytest.mark.parametrize("backend", ["grouped_cpu", "grouped_mm", "loop"])
@pytest.mark.parametrize("gate_on_input", [False, True])
def test_what_is_added_is_added_and_not_kept(backend, gate_on_input):
    experts, routing = make_experts(torch.float32, expert_gate_on_input=gate_on_input), make_routing(40, 2, 5)
    experts.forced_backend = backend
    x, upstream = torch.randn(2, 40, 16)
    added = torch.randn(40, 16, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = experts(x, routing, added)
    torch.testing.assert_close(y, experts(x, routing) + added)
    y.backward(upstream)
    assert torch.equal(added.grad, upstream)
    assert added.data_ptr() not in kept
