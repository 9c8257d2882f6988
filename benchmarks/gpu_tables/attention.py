"""Attention with sinks, windows and documents against `F.scaled_dot_product_attention`."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_tables.measuring.bench import Bench, ratio
from litgpt_moe_ext.attention.causal_attention import causal_attention
from litgpt_moe_ext.attention.documents import find_documents
from litgpt_moe_ext.attention.sinks import Softmax
from litgpt_moe_ext.tokens.rows import Rows


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for T, backward in itertools.product((64,) if bench.tiny else (1024, 4096), (False, True)):
        times = bench.medians(_contenders(T, backward, bench), ahead=True)
        reference = times.pop("SDPA")
        kind = "forward and backward" if backward else "forward"
        over = {f"{name} / SDPA": ratio(time, reference) for name, time in times.items()}
        yield {"tokens": T, "pass": kind, "SDPA, ms": reference, **over}


def _contenders(T: int, backward: bool, bench: Bench) -> dict[str, Callable[[], object]]:
    """Return torch's attention and ours of T tokens, which run the backward pass as well if wanted."""
    H, G, D = 12, 4, 64
    q, k, v = (
        torch.randn(4, n, T, D, device=bench.device, dtype=bench.dtype).requires_grad_(backward) for n in (H, G, G)
    )
    sinks = torch.zeros(H, device=bench.device).requires_grad_(backward)
    # As a loader hands them out, and Fabric moves them.
    ends = (torch.arange(1, T + 2) % (T // 4) == 0).long().expand(4, -1).as_subclass(Rows)
    ids = ends.to(bench.device)[:, :T]
    patterns = {
        "sinks": (sinks, {}),
        "no sinks": (None, {}),
        "window": (sinks, {"window": T // 8}),
        "documents": (sinks, {"documents": find_documents(ids, "eos", 1)}),
    }
    attentions = {"SDPA": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)}
    for name, (sink, pattern) in patterns.items():
        attentions[name] = partial(causal_attention, q, k, v, Softmax(sink, D**-0.5), **pattern)
    return {name: partial(_run, attend, backward) for name, attend in attentions.items()}


def _run(attend: Callable[[], Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        y = attend()
        if backward:
            y.backward(y.detach())
