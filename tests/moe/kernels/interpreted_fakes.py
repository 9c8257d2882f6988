"""What operators promise to return, held against what their kernels return; `tests/test_triton.py` interprets it."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from litgpt_moe_ext.moe.kernels.operators import shared
from litgpt_moe_ext.moe.kernels.routing import fused_router, router_product
from litgpt_moe_ext.moe.kernels.routing.fused_router import Decision, Given, Rule

T, D, E = 6, 16, 8


def compare(operator, *arguments):
    """Compare shapes and dtypes of an operator's results for real and for fake tensors; return the real ones."""
    results = operator(*arguments)
    with FakeTensorMode() as mode:
        promised = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    found, expected = (
        [(tuple(x.shape), x.dtype) for x in ([both] if isinstance(both, Tensor) else both)]
        for both in (promised, results)
    )
    assert found == expected
    return results


NOISY = Rule("chosen", 2, balancing=0.1, sequence=0.2, z=0.1, importance=0.1, load=0.1, sequences=2)


@pytest.mark.parametrize(
    "rule",
    [NOISY, Rule("sigmoid", 2, True, z=0.1), Rule("softmax", 3, balancing=0.1, global_batch=True)],
    ids=lambda rule: rule.score,
)
@pytest.mark.parametrize("trains", [False, True])
def test_decisions_and_their_gradients(rule, trains):
    given = Given(torch.randn(T, E), torch.zeros(E))
    if rule is NOISY:
        given = Given(torch.randn(T, E), None, torch.randn(T, E), torch.randn(T, E), None, torch.tensor(0.5))
    decision = Decision(*compare(fused_router.route_operator, *given, *rule, trains))
    if trains:
        upstream = torch.ones_like(decision.weights_TK), torch.ones(())
        back = decision.experts_TK, decision.ends_E, decision.slopes_LE, *upstream
        compare(fused_router._route_backward, *given, *rule, *back)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_sums_with_shared_experts_and_their_gradients(gated, padded):
    logits = torch.randn(T, 1) if gated else None
    real = torch.arange(T) < T - 1 if padded else None
    for kind in ("add_gated", "add_gated_backward"):
        operator = getattr(shared, kind)._overload
        compare(operator, torch.randn(T, D).bfloat16(), torch.randn(T, D).bfloat16(), logits, real)


@pytest.mark.parametrize("apart", [False, True])
def test_gated_activations_and_their_gradients(apart):
    hidden = (torch.randn(T, D), torch.randn(T, D)) if apart else (torch.randn(T, 2 * D), None)
    compare(shared.glu._overload, *hidden, "swiglu", "none")
    compare(shared.glu_backward._overload, torch.randn(T, D), *hidden, "swiglu", "none")


@pytest.mark.parametrize("needs", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_routers_and_their_gradients(needs, dtype, monkeypatch):
    monkeypatch.setattr(router_product, "_has_tensor_cores", lambda device: True)
    x, weight = torch.randn(T, D), torch.randn(E, D)
    compare(router_product.project_tokens._overload, x, weight, dtype)
    passed = (torch.randn(T, D, dtype=dtype), torch.randn(T, D, dtype=dtype)) if needs[0] else (None, None)
    compare(router_product.project_backward._overload, torch.randn(T, E), x, weight, *passed, *needs)
