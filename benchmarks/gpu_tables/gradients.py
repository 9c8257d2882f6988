"""Accumulated gradients of first projections: added by the product itself, or by autograd after it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_tables.contenders.layers import sizes
from gpu_tables.measuring.bench import Bench
from litgpt_moe_ext.kernels.launch import triton_works_on
from litgpt_moe_ext.moe.kernels import native
from litgpt_moe_ext.moe.kernels.plan import Outer, plan_of


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    engines: dict[str, Any] = {"torch": native}
    if bench.is_cuda and triton_works_on(bench.device):
        from litgpt_moe_ext.moe.kernels import triton

        engines = {"triton": triton, **engines}
    for T in (64,) if bench.tiny else (16384, 2048):
        for size in sizes(bench.tiny):
            n_row = T * size.K
            rows_R = torch.randperm(n_row, device=bench.device)
            ends_E = torch.arange(1, size.E + 1, device=bench.device, dtype=torch.int32) * (n_row // size.E)
            x = torch.randn(T, size.D, device=bench.device, dtype=bench.dtype)
            dh = torch.randn(n_row, 2 * size.F, device=bench.device, dtype=bench.dtype)
            outer = Outer(dh, x, plan_of(rows_R, ends_E, T), gather_right=True)
            total = torch.zeros(size.E, 2 * size.F, size.D, device=bench.device)
            calls: dict[str, Callable[[], object]] = {}
            for name, engine in engines.items():
                multiply = engine.sum_outer_products
                calls[f"{name}, ms"] = partial(multiply, outer, torch.float32, total)
                calls[f"{name} and autograd, ms"] = lambda m=multiply, o=outer, t=total: t.add_(m(o, torch.float32))
            chosen = "torch" if native.sums_fast(outer) else next(iter(engines))
            yield {"layer": size.title, "tokens": T, "chosen": chosen, **bench.medians(calls, ahead=True)}
