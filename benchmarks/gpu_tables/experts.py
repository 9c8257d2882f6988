"""Experts: our layers against LitGPT's `LLaMAMoE`, Hugging Face's, Liger's, a dense MLP and bare matrix products."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_tables.contenders.layers import BACKENDS, Size, forward_backward, make_layers, sizes
from gpu_tables.measuring.bench import Bench, ratio


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Measure both passes, our fastest backend against others' layers, and how long the host takes to launch them."""
    for T in (64,) if bench.tiny else (16384, 2048, 65536):
        for size in sizes(bench.tiny):
            x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype).requires_grad_()
            calls = {name: partial(forward_backward, layer, x) for name, layer in make_layers(size, bench).items()}
            times = bench.medians({**calls, "products": _bare_products(size, T, bench)}, ahead=True)
            names = (*BACKENDS, "LLaMAMoE", "HF", "Liger", "dense", "products")
            best = min((times[name] for name in BACKENDS[:2] if times.get(name)), default=None)
            rivals = ("LLaMAMoE", "grouped_mm", "dense", "products")
            yield {
                "layer": size.title,
                "tokens": T,
                **{f"{name}, ms": times.get(name) for name in names},
                **{f"{name} / ours": ratio(times.get(name), best) for name in rivals},
                **{f"host, {name}": bench.host_ms(calls[name]) for name in (next(iter(calls)), "dense")},
            }


def _bare_products(size: Size, T: int, bench: Bench) -> Callable[[], None]:
    """Return the matrix products of the active rows alone, evenly spread over the experts."""
    n = max(1, T * size.K // size.E)
    random = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    x, a, h = random(size.E, n, size.D), random(size.E, n, size.F), random(size.E, n, 2 * size.F)
    up, down = random(size.E, 2 * size.F, size.D), random(size.E, size.D, size.F)

    def run() -> None:
        torch.bmm(x, up.mT)
        torch.bmm(a, down.mT)
        torch.bmm(x, down)
        torch.bmm(x.mT, a)
        torch.bmm(h.mT, x)
        torch.bmm(h, up)

    return run
