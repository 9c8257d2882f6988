"""The orthogonality loss by the package's kernels and in float64, for tests in the interpreter and on a card."""

import torch

from litgpt_moe_ext.moe.balancing.losses import orthogonality_loss
from litgpt_moe_ext.moe.kernels.routing.orthogonality import Directions, weighted_orthogonality


def weighted(weight, coef):
    """Return the loss by the package's kernels."""
    return weighted_orthogonality(Directions(weight, coef))


def gradients_of(loss, weight, *arguments):
    """Return a loss and its gradient, both as a training loop scales them."""
    weight = weight.detach().requires_grad_()
    value = loss(weight, *arguments)
    (3.0 * value).backward()
    return {"loss": value.detach(), "weight": weight.grad}


def compare_orthogonality(weight, coef=0.02):
    """Hold loss and gradient against float64, as closely as torch's float32 operators come to it."""
    ours = gradients_of(weighted, weight, coef)
    theirs, truth = (
        gradients_of(lambda weight: coef * orthogonality_loss(weight), weight.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert (ours["loss"].dtype, ours["loss"].shape) == (torch.float32, ())
    assert ours["weight"].dtype == weight.dtype
    # One for each pair of rows is what the loss could be; the gradient is as large as it is for parallel rows.
    n_expert = weight.size(0)
    lengths_E1 = weight.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    scales = {"loss": coef * n_expert, "weight": 4 * 3 * coef * n_expert**0.5 / lengths_E1}
    for name, exact in truth.items():
        error, theirs_error = (((y[name].double() - exact) / scales[name]).abs().max().item() for y in (ours, theirs))
        rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(ours[name].dtype, 0.0)
        largest = (exact / scales[name]).abs().max().item()
        assert error <= 4 * theirs_error + 2e-6 + rounding * largest, (name, error, theirs_error)
