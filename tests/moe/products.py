"""A router's product by the package's kernels and in float64, for tests in the interpreter and on a card."""

import torch

from litgpt_moe_ext.moe.kernels.router_product import project

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


def every_bit(dtype, device="cpu"):
    """Return weights and tokens, each as it is and as products with ones give it."""
    weight, eye = torch.randn(5, 40, device=device), torch.eye(40, device=device).to(dtype)
    x, chosen = torch.randn(5, 40, device=device).to(dtype), torch.eye(5, device=device)
    logits = gradients_of(project, eye, weight, torch.zeros(40, 5, device=device))["logits"]
    gradients = gradients_of(project, x, weight, chosen)
    return {"logits": (logits, weight.t()), "x": (gradients["x"], weight.to(dtype)),
            "weight": (gradients["weight"], x.float())}  # fmt: skip
