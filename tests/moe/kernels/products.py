"""A router's product by the package's kernels and in float64, for tests in the interpreter and on a card."""

import torch

from litgpt_moe_ext.moe.kernels.routing.router_product import project, project_and_pass

# Half of the last digit of what results are rounded to, relative to the largest, times two for the interpreter, which
# cuts off bfloat16.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def gradients_of(product, x, weight, upstream):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = product(x, weight)
    logits.backward(upstream)
    return {"logits": logits.detach(), "x": x.grad, "weight": weight.grad}


def compare_product(T, D, E, dtypes=(torch.bfloat16, torch.float32), device="cpu"):
    """Hold logits and gradients against float64, as closely as torch's float32 product comes to it."""
    x = torch.randn(T, D, device=device).to(dtypes[0])
    weight, upstream = torch.randn(E, D, device=device).to(dtypes[1]), torch.randn(T, E, device=device)
    ours = gradients_of(project, x, weight, upstream)
    linear = torch.nn.functional.linear
    theirs = gradients_of(linear, x.float(), weight.float(), upstream)
    truth = gradients_of(linear, x.double(), weight.double(), upstream.double())
    types = {"logits": torch.float32, "x": dtypes[0], "weight": dtypes[1]}
    for name, exact in truth.items():
        assert ours[name].dtype == types[name], name
        largest = exact.abs().max().item()
        error, theirs_error = ((y[name].double() - exact).abs().max().item() / largest for y in (ours, theirs))
        # Tensor Cores cut off where the ordinary cores round.
        assert error <= max(4 * theirs_error, 4e-6, ROUNDING.get(types[name], 0.0)), (name, error, theirs_error)


# Dtypes of tokens, and in which they are passed on.
PASSED = [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16),
    (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16),
]  # fmt: skip


def compare_passed(T, D, E, dtypes, device="cpu"):
    """Hold tokens that are passed on against the tokens, and the sum of three gradients against float64."""
    x = torch.randn(T, D, device=device).to(dtypes[0]).requires_grad_()
    weight, dlogits = torch.randn(E, D, device=device).requires_grad_(), torch.randn(T, E, device=device)
    routed, shared = torch.randn(2, T, D, device=device).to(dtypes[1])
    logits, *tokens = project_and_pass(x, weight, dtypes[1])
    rounding = max(ROUNDING.get(dtype, 4e-6) for dtype in dtypes)
    for passed in tokens:
        assert passed.dtype == dtypes[1]
        torch.testing.assert_close(passed.to(x.dtype), x.detach(), rtol=rounding, atol=1e-7)
    torch.autograd.backward([logits, *tokens], [dlogits, routed, shared])
    exact = dlogits.double() @ weight.detach().double() + routed.double() + shared.double()
    assert x.grad.dtype == dtypes[0]
    error = (x.grad.double() - exact).abs().max() / exact.abs().max()
    assert error <= ROUNDING.get(dtypes[0], 4e-6), error
    alone = gradients_of(project, x, weight, dlogits)
    assert torch.equal(logits, alone["logits"])
    assert torch.equal(weight.grad, alone["weight"])


def every_bit(dtype, device="cpu"):
    """Return weights and tokens, each as it is and as products with ones give it."""
    weight, eye = torch.randn(5, 40, device=device), torch.eye(40, device=device).to(dtype)
    x, chosen = torch.randn(5, 40, device=device).to(dtype), torch.eye(5, device=device)
    logits = gradients_of(project, eye, weight, torch.zeros(40, 5, device=device))["logits"]
    gradients = gradients_of(project, x, weight, chosen)
    return {"logits": (logits, weight.t()), "x": (gradients["x"], weight.to(dtype)),
            "weight": (gradients["weight"], x.float())}  # fmt: skip
