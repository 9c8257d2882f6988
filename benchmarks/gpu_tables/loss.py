"""Output head and loss, both passes: LitGPT's, torch's at once, Liger's where installed, ours, and ours fused.

Shape legend: T tokens, D model width, V vocabulary.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from gpu_tables.measuring.bench import Bench, ratio
from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.loss.cross_entropy import has_kernel, mean_cross_entropy
from litgpt_moe_ext.loss.linear import linear_loss

# Output heads of the recipes: tokens of a micro-batch, model width, vocabulary.
_HEADS = {
    "quickstart": (2048, 128, 2048),
    "code-moe-60m": (16384, 512, 49152),
    "moe-200m-tinystories": (8192, 768, 32000),
    "gpt-moe-fineweb": (8192, 768, 50304),
}


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for name, (T, D, V) in {"tiny": (96, 32, 100)}.items() if bench.tiny else _HEADS.items():
        head = nn.Linear(D, V, bias=False, device=bench.device)
        x_TD = torch.randn(T, D, device=bench.device, requires_grad=True)
        targets_T = torch.randint(V, (T,), device=bench.device)
        half = [torch.randn(size, device=bench.device, dtype=bench.dtype) for size in ((T, D), (V, D), (T, V))]
        calls: dict[str, Callable[[], object]] = {
            kind: partial(_loss_and_gradient, loss, head, x_TD, bench)
            for kind, loss in _losses(head, targets_T, bench).items()
        }
        peaks = {kind: _peak_mb(call, bench) for kind, call in calls.items()}
        times = bench.medians({**calls, "products": partial(_products, *half)}, ahead=True)
        yield {
            "recipe": name, "tokens": T, "vocabulary": V,
            **{f"{kind}, ms": times.get(kind) for kind in ("LitGPT", "torch", "Liger", "ours", "fused", "products")},
            "LitGPT / ours": ratio(times["LitGPT"], times.get("ours")),
            **{f"{kind}, MB": peaks.get(kind) for kind in ("LitGPT", "ours", "fused")},
        }  # fmt: skip


def _losses(head: nn.Linear, targets_T: Tensor, bench: Bench) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what makes a mean loss of the input of an output head, under autocast."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        # As Fabric hands logits on.
        "LitGPT": lambda x_TD: chunked_cross_entropy(head(x_TD).float(), targets_T),
        "torch": lambda x_TD: F.cross_entropy(head(x_TD).float(), targets_T),
    }
    if importlib.util.find_spec("liger_kernel") is not None and bench.is_cuda:
        from liger_kernel.transformers.functional import liger_cross_entropy

        losses["Liger"] = lambda x_TD: liger_cross_entropy(head(x_TD), targets_T)
    if has_kernel(head.weight.detach(), targets_T):
        losses["ours"] = lambda x_TD: mean_cross_entropy(head(x_TD), targets_T)
    if hasattr(F, "linear_cross_entropy"):
        losses["fused"] = lambda x_TD: linear_loss(x_TD, targets_T, head, matmul_dtype(x_TD))
    return losses


def _loss_and_gradient(loss: Callable[[Tensor], Tensor], head: nn.Linear, x_TD: Tensor, bench: Bench) -> None:
    """Run both passes of an output head and its loss."""
    with torch.autocast(bench.device.type, bench.dtype):
        value = loss(x_TD)
    torch.autograd.grad(value, [x_TD, head.weight])


def _products(x_TD: Tensor, weight_VD: Tensor, grad_TV: Tensor) -> None:
    """Compute only the products of an output head's passes."""
    x_TD @ weight_VD.t()
    grad_TV @ weight_VD
    grad_TV.t() @ x_TD


def _peak_mb(call: Callable[[], object], bench: Bench) -> float | None:
    """Return the additional memory of a call in MB; None without a card, or if it fails."""
    if not bench.is_cuda:
        return None
    try:
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
    except Exception:  # said where the call is measured
        return None
    return (torch.cuda.max_memory_allocated() - before) / 1e6
