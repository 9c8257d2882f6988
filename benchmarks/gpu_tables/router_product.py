"""A router's product by the package's kernel and by torch, and the error of its weights' gradient."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_tables.contenders.layers import make_router
from gpu_tables.measuring.bench import Bench, ratio
from litgpt_moe_ext.moe.kernels.routing import router_product

_Product = Callable[[Tensor, Tensor], Tensor]


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    T, D = (64, 64) if bench.tiny else (16384, 768)
    for E, dtype in itertools.product((8, 64), dict.fromkeys((bench.dtype, torch.float32))):
        x = torch.randn(T, D, device=bench.device, dtype=dtype).requires_grad_()
        upstream = torch.randn(T, E, device=bench.device)
        gate = make_router(D, E, expert_backend="loop").to(bench.device)
        # Ours needs a card.
        products = {"ours": router_product.project if bench.is_cuda else gate.project, "torch": gate.project}
        row: dict[str, Any] = {"tokens": T, "width": D, "experts": E, "of": str(dtype).removeprefix("torch.")}
        for what, run in (("forward", _forward), ("both", _both)):
            calls = {
                f"{what}, {n}, ms": partial(run, product, x, gate.weight, upstream) for n, product in products.items()
            }
            times = bench.medians(calls, ahead=True)
            ours, theirs = times.values()
            row |= times | {f"{what}, torch / ours": ratio(theirs, ours)}
        exact = upstream.double().t() @ x.detach().double()
        for name, product in products.items():
            row[f"error, {name}"] = None
            if row[f"both, {name}, ms"] is not None:
                _, dweight = _both(product, x, gate.weight, upstream)
                row[f"error, {name}"] = ((dweight - exact).abs().max() / exact.abs().max()).item()
        yield row


def _forward(product: _Product, x: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
    return product(x, weight)


def _both(product: _Product, x: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of tokens and weights."""
    return torch.autograd.grad(product(x, weight), (x, weight), upstream)
