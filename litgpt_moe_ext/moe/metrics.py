"""How evenly tokens are spread over experts, and how sure the routers are.

Shape legend: L layers, E experts.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.moe.router import SUMS, Router


def max_over_mean(load_LE: Tensor) -> Tensor:
    """Return max(load) / mean(load) over the last dimension: 1 is perfect balance, E is total collapse (for K = 1).

    MaxVio of arXiv:2408.15664 (equation 4) is this minus 1.
    """
    return load_LE.amax(dim=-1) / _mean(load_LE)


def coefficient_of_variation(load_LE: Tensor) -> Tensor:
    """Return the standard deviation of the load over its mean; 0 is perfect balance."""
    return load_LE.std(dim=-1, correction=0) / _mean(load_LE)


def load_entropy(load_LE: Tensor) -> Tensor:
    """Return the entropy of the shares of load over its largest value, ln E: 1 is perfect balance, 0 total collapse."""
    if load_LE.size(-1) == 1:
        return torch.ones_like(load_LE[..., 0])
    shares_LE = load_LE / (_mean(load_LE) * load_LE.size(-1)).unsqueeze(-1)
    return torch.special.entr(shares_LE).sum(dim=-1) / torch.tensor(load_LE.size(-1), dtype=load_LE.dtype).log()


def _mean(load_LE: Tensor) -> Tensor:
    return load_LE.mean(dim=-1).clamp(min=torch.finfo(load_LE.dtype).tiny)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Return the plugin's routers in `model` by module name, in order of depth."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def load_metrics(model: nn.Module) -> dict[str, float]:
    """Return the balance of the last optimizer step, over all processes, for a logger.

    Waits for the device, so call it at log intervals.

    Returns:
        Three groups of metrics; empty before the first step and for models without the plugin's MoE layers.

        `moe/NAME` sums up the layers: `max_over_mean` and `max_vio` (worst layer), `max_over_mean_avg` (mean over
        layers), `dead_experts` (experts without a token, over all layers), `load_cv` (worst layer), `load_entropy`
        (worst layer, 1 is even), `router_entropy` (mean, in nats), `router_logit_rms` (largest), `mean_gate` (mean),
        `bias_range` (largest minus smallest balancing bias, worst layer; only with a bias), and auxiliary losses by
        name, with their weights and summed over layers.

        `moe_layer_LL/NAME` has those that mean something for one layer, LL being its number among all layers.

        `moe_load_LL/expert_EE` is the load of an expert over the mean of its layer.
    """
    routers = {name: router for name, router in routers_of(model).items() if router.record is not None}
    if not routers:
        return {}
    layers = {_layer_number(name, i): _layer_metrics(router) for i, (name, router) in enumerate(routers.items())}
    metrics = _summary(list(layers.values()))
    for number, (router, values) in zip(layers, zip(routers.values(), layers.values(), strict=True), strict=True):
        metrics |= {f"moe_layer_{number:02}/{name}": value for name, value in values.items()}
        load_E = router.load_E.cpu()
        shares = (load_E / _mean(load_E)).tolist()
        metrics |= {f"moe_load_{number:02}/expert_{e:02}": share for e, share in enumerate(shares)}
    return metrics


def _layer_number(name: str, position: int) -> int:
    # `transformer.h.3.mlp.gate` is in layer 3.
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else position


def _layer_metrics(router: Router) -> dict[str, float]:
    record = router.record.cpu()
    load_E, rest = record[: router.n_expert], record[router.n_expert :].tolist()
    sums, losses = dict(zip(SUMS, rest, strict=False)), rest[len(SUMS) :]
    tokens, batches = max(sums["tokens"], 1.0), max(sums["batches"], 1.0)
    metrics: dict[str, Any] = {
        "max_over_mean": max_over_mean(load_E).item(),
        "dead_experts": int((load_E == 0).sum()),
        "load_cv": coefficient_of_variation(load_E).item(),
        "load_entropy": load_entropy(load_E).item(),
        "mean_gate": sums["gate"] / (tokens * router.top_k),
    }
    if router.weight is not None:
        metrics["router_entropy"] = sums["entropy"] / tokens
        metrics["router_logit_rms"] = (sums["squared_logit"] / tokens) ** 0.5
    if router.bias_update_rate:
        bias_E = router.e_score_correction_bias
        metrics["bias_range"] = (bias_E.amax() - bias_E.amin()).item()
    return metrics | {name: loss / batches for name, loss in zip(router.loss_names, losses, strict=True)}


def _summary(layers: list[dict[str, float]]) -> dict[str, float]:
    def column(name: str) -> list[float]:
        return [layer[name] for layer in layers if name in layer]

    balance = column("max_over_mean")
    summary = {
        "moe/max_over_mean": max(balance),
        "moe/max_over_mean_avg": sum(balance) / len(balance),
        "moe/max_vio": max(balance) - 1,
        "moe/dead_experts": sum(column("dead_experts")),
        "moe/load_cv": max(column("load_cv")),
        "moe/load_entropy": min(column("load_entropy")),
        "moe/mean_gate": sum(column("mean_gate")) / len(layers),
    }
    if entropies := column("router_entropy"):
        summary["moe/router_entropy"] = sum(entropies) / len(entropies)
        summary["moe/router_logit_rms"] = max(column("router_logit_rms"))
    if ranges := column("bias_range"):
        summary["moe/bias_range"] = max(ranges)
    for name in dict.fromkeys(name for layer in layers for name in layer if name.endswith("_loss")):
        summary[f"moe/{name}"] = sum(column(name))
    return summary
