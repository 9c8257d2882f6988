"""Routers by the fused kernels and by torch's operators, for tests in the interpreter and on a card."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from litgpt_moe_ext.moe.balancing.bias import update_routers
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale, remember_scale
from litgpt_moe_ext.moe.balancing.metrics import load_metrics
from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.kernels.plan import sort_rows
from litgpt_moe_ext.moe.kernels.routing import fused_router
from litgpt_moe_ext.moe.layer import MoE
from tests.models import moe_config, randomize

BALANCING = {"router_load_balancing_loss_coef": 0.05}
Z = {"router_z_loss_coef": 0.02}
GROUPS = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
NOISY = {"router_type": "noisy_topk"}
SEQUENCES = {"router_sequence_balancing_loss_coef": 0.03}
GLOBAL = {**BALANCING, "router_load_balancing_loss_scope": "global_batch"}
ORTHOGONALITY = {"router_orthogonality_loss_coef": 0.02}
RULES = {
    "sigmoid": {},
    "sigmoid, balancing": {"norm_topk_prob": True, "routed_scaling_factor": 2.5, **BALANCING, **Z},
    "sigmoid, groups": {"norm_topk_prob": True, **GROUPS},
    "softmax": {"router_score_function": "softmax", **Z},
    "softmax, balancing": {"router_score_function": "softmax", "norm_topk_prob": True, **BALANCING},
    "noisy": NOISY,
    "noisy, all losses": {**NOISY, **BALANCING, **Z, "routed_scaling_factor": 1.5},
    "importance": {"router_importance_loss_coef": 0.1, **BALANCING},
    "sigmoid, sequences": {"routed_scaling_factor": 2.5, **SEQUENCES, **BALANCING, **Z},
    "softmax, sequences": {"router_score_function": "softmax", **SEQUENCES},
    "sigmoid, global batch": {**GLOBAL, **ORTHOGONALITY},
    "noisy, everything": {**NOISY, **GLOBAL, **SEQUENCES, **Z, **ORTHOGONALITY},
}


def keep_choices():
    """Return contexts of torch's selective checkpointing, as a user may have them, that keep what is chosen."""
    return create_selective_checkpoint_contexts([torch.ops.aten.topk.default, fused_router.route_operator])


def make_gate(**changes):
    return randomize(MoE(moe_config(mlp_class_name="MoE", router_bias_update_rate=None, **changes))).gate


def run(gate, x, upstream, fused, n_sequence=1, real=None):
    """Return the decision, all gradients, and what is recorded, of a loss that a training loop scales."""
    gate.zero_grad()
    before = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
    x = x.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_router, "works_on", lambda x: fused)
        torch.manual_seed(3)
        routing = gate(x, n_sequence, real)
        assert (routing.decision is not None) == fused
    # In the order of experts, which is the same whatever the order of the choices.
    order_TK = routing.experts_TK.argsort(1)
    weights_TK = routing.weights_TK.gather(1, order_TK)
    result = {"weights": weights_TK, "experts": routing.experts_TK.gather(1, order_TK), "counts": routing.counts_E}
    if gate.training:
        (remember_scale((weights_TK * upstream).sum()) * 0.25).backward()
        forget_scale()
        result |= {"x": x.grad, **{name: p.grad for name, p in gate.named_parameters()}}
        update_routers([gate])
        result["record"] = gate.record
        gate.load_state_dict(before)  # the update has moved the bias
    return {name: value.detach().clone() for name, value in result.items()}, routing


def compare(gate, T, n_sequence=1, padded=False):
    """Hold the fused router against torch's operators, with half the tokens padding if `padded`."""
    D, K = gate.weight.size(1), gate.top_k
    device = gate.weight.device
    x, upstream = torch.randn(T, D, device=device), torch.rand(T, K, device=device)
    real = torch.rand(T, device=device) < 0.5 if padded else None
    (ours, routing), (expected, _) = (run(gate, x, upstream, fused, n_sequence, real) for fused in (True, False))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    rows_R, ends_E = sort_rows(routing.experts_TK, routing.counts_E, padded)
    assert torch.equal(routing.decision.rows_R, rows_R)
    assert torch.equal(routing.decision.ends_E, ends_E)


def compare_fixed(kind, padded, device):
    """Hold the fused kernels against torch's operators for a router that does not learn."""
    gate = MoE(moe_config(mlp_class_name="MoE", router_type=kind, n_expert_per_token=3)).to(device).gate
    ids = TokenIds(torch.arange(130, device=device) * 7919)
    x, upstream = torch.randn(130, 16, device=device), torch.rand(130, 1, device=device)
    real = torch.rand(130, device=device) < 0.5 if padded else None
    results = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_router, "works_on", lambda x, fused=fused: fused)
            torch.manual_seed(3)
            routing = gate(x, 1, real, ids)
        (routing.weights_TK * upstream).sum().backward()
        update_routers([gate])
        experts_TK = routing.experts_TK.sort(1).values
        results.append((routing.weights_TK, experts_TK, routing.counts_E, gate.record))
        if fused:
            rows_R, ends_E = sort_rows(routing.experts_TK, routing.counts_E, padded)
            assert torch.equal(routing.decision.rows_R, rows_R)
            assert torch.equal(routing.decision.ends_E, ends_E)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


LAYERS = {
    "shared": {"n_shared_expert": 2, **Z},
    "gated": {"n_shared_expert": 1, "shared_expert_gate": True, "bias": True, **SEQUENCES},
    "on input": {"expert_gate_on_input": True, "n_shared_expert": 1, **BALANCING},
}


def _columns_first(x):
    return x.flatten(0, -2).t().contiguous().t().view(x.shape)


def compare_layer(name, backend, size, padded, device, dtype=None):
    """Hold a whole layer against one of ordinary operators, with a part of the (B, T) tokens padding if `padded`.

    Experts go by the fused router's order of rows, shared experts are added by a kernel, and neither sees padding.
    With a `dtype`, under autocast.
    """
    torch.manual_seed(0)
    changes = {"mlp_class_name": "MoE", **LAYERS[name]}
    ours, loop = (MoE(moe_config(expert_backend=which, **changes)).to(device) for which in (backend, "loop"))
    loop.load_state_dict(randomize(ours).state_dict())
    x, upstream = torch.randn(2, *size, 16, device=device)
    real = torch.rand(size, device=device) < 0.6 if padded else None
    results = []
    for moe in (ours, loop):
        if moe.shared_experts is not None:
            # A hook's results may lie in memory in any order.
            moe.shared_experts.register_forward_hook(lambda _module, _inputs, y: _columns_first(y))
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            y = moe(leaf, real)
        y.backward(upstream.to(y.dtype))
        results.append({"y": y, "x": leaf.grad} | {name: p.grad for name, p in moe.named_parameters()})
    tolerance = 2e-2 if dtype else 1e-4
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def max_violations(model, lr, steps):
    """Train a model on random tokens; return MaxVio of the first step, and its mean over the last 20."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for _ in range(steps):
        ids = torch.randint(0, 64, (8, 33))
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(load_metrics(model)["moe/max_vio"])
    return history[0], sum(history[-20:]) / 20
