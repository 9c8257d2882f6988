"""Routers by the fused kernels and by torch's operators, which launch some forty kernels."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_tables.contenders.layers import make_router
from gpu_tables.measuring.bench import Bench, ratio

_RULES: dict[str, dict[str, Any]] = {
    "sigmoid, bias": {"router_score_function": "sigmoid", "norm_topk_prob": True, "router_bias_update_rate": 0.001},
    "softmax, balancing loss": {"router_score_function": "softmax", "router_load_balancing_loss_coef": 0.01},
    "noisy, two losses": {"router_type": "noisy_topk"},
}


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    T, D = (64, 64) if bench.tiny else (16384, 768)
    # From 128 experts on several programs add up what the others decided.
    for (rule, settings), E in itertools.product(_RULES.items(), (8,) if bench.tiny else (64, 128, 512)):
        x = torch.randn(T, D, device=bench.device, dtype=bench.dtype).requires_grad_()
        routers = {
            f"{name}, ms": make_router(D, E, expert_backend=backend, **settings).to(bench.device)
            for name, backend in (("fused", None), ("operators", "loop"))
        }
        times = bench.medians({name: partial(_route, router, x) for name, router in routers.items()}, ahead=True)
        more = ratio(times["operators, ms"], times["fused, ms"])
        yield {"router": rule, "tokens": T, "experts": E, **times, "operators / fused": more}


def _route(router: nn.Module, x: Tensor) -> None:
    router.zero_grad()
    router(x).weights_TK.sum().backward()
