"""How evenly tokens are spread over experts, and how sure the routers are.

Shape legend: L layers, E experts.
"""

import itertools
from collections import defaultdict

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.moe.routing.record import SUMS
from litgpt_moe_ext.moe.routing.router import Router


def max_violation(load_LE: Tensor) -> Tensor:
    """Return max(load) / mean(load) - 1 over the last dimension, the MaxVio of arXiv:2408.15664 (equation 4).

    0 is perfect balance, E / K - 1 total collapse.
    """
    return load_LE.amax(dim=-1) / _mean(load_LE) - 1


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
    """Return the routers of this package in `model` by module name, in order of depth."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def load_metrics(model: nn.Module) -> dict[str, float]:
    """Return the balance of the last optimizer step, over all ranks, for a logger.

    Waits for the device once, so call it at log intervals.

    Returns:
        Three groups of metrics; empty before the first step and for models without MoE layers of this package.

        `moe/NAME` sums up the layers: `max_vio` (worst layer), `max_vio_avg` (mean over layers), `dead_experts`
        (experts without a token, over all layers), `load_cv` (worst layer), `load_entropy` (worst layer, 1 is even),
        `router_entropy` (mean, in nats), `router_logit_rms` (largest), `mean_gate` (mean), `bias_range` (largest minus
        smallest balancing bias, worst layer; only with a bias), and auxiliary losses by name, with their weights and
        summed over layers.

        `moe_layer_LL/NAME` has those that are defined for one layer; LL is its index among all layers.

        `moe_load_LL/expert_EE` is the load of an expert over the mean of its layer.
    """
    routers = {name: router for name, router in routers_of(model).items() if router.record is not None}
    if not routers:
        return {}
    records = [router.record for router in routers.values() if router.record is not None]
    biases = [router.e_score_correction_bias for router in routers.values() if router.bias_update_rate]
    # One transfer for all layers, since each transfer waits for the device. Concatenated by dtype first: a GPU copies
    # tensors of mixed dtypes one by one.
    together = torch.cat([torch.cat(alike).to(records[0].dtype) for alike in (records, biases) if alike])
    tensors = iter(together.cpu().split([len(tensor) for tensor in records + biases]))
    records, biases = list(itertools.islice(tensors, len(records))), tensors
    metrics, layers = {}, []
    for position, ((name, router), record) in enumerate(zip(routers.items(), records, strict=True)):
        values = _layer_metrics(router, record)
        if router.bias_update_rate:
            bias_E = next(biases)
            values["bias_range"] = (bias_E.amax() - bias_E.amin()).item()
        number, load_E = _layer_number(name, position), record[: router.n_expert]
        metrics |= {f"moe_layer_{number:02}/{key}": value for key, value in values.items()}
        shares = (load_E / _mean(load_E)).tolist()
        metrics |= {f"moe_load_{number:02}/expert_{e:02}": share for e, share in enumerate(shares)}
        layers.append(values)
    return _summary(layers) | metrics


def _layer_number(name: str, position: int) -> int:
    # `transformer.h.3.mlp.gate` is in layer 3.
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else position


def _layer_metrics(router: Router, record: Tensor) -> dict[str, float]:
    load_E, rest = record[: router.n_expert], record[router.n_expert :].tolist()
    sums = dict(zip(SUMS, rest, strict=False))
    visits = max(load_E.sum().item(), 1.0)
    tokens = visits / router.top_k
    metrics = {
        "max_vio": max_violation(load_E).item(),
        "dead_experts": int((load_E == 0).sum()),
        "load_cv": coefficient_of_variation(load_E).item(),
        "load_entropy": load_entropy(load_E).item(),
        "mean_gate": sums["gate"] / visits / router.scaling_factor,
    }
    if router.weight is not None:
        metrics["router_entropy"] = sums["entropy"] / tokens
        metrics["router_logit_rms"] = (sums["squared_logit"] / (tokens * router.n_expert)) ** 0.5
    losses = zip(router.loss_names, rest[len(SUMS) :], strict=True)
    return metrics | {name: loss / tokens for name, loss in losses}


# How the metrics of all layers become one; auxiliary losses are added up.
_OVER_LAYERS = {
    "max_vio": max,
    "dead_experts": sum,
    "load_cv": max,
    "load_entropy": min,
    "mean_gate": lambda values: sum(values) / len(values),
    "router_entropy": lambda values: sum(values) / len(values),
    "router_logit_rms": max,
    "bias_range": max,
}


def _summary(layers: list[dict[str, float]]) -> dict[str, float]:
    columns = defaultdict(list)
    for layer in layers:
        for name, value in layer.items():
            columns[name].append(value)
    summary = {f"moe/{name}": _OVER_LAYERS.get(name, sum)(values) for name, values in columns.items()}
    return summary | {"moe/max_vio_avg": sum(columns["max_vio"]) / len(layers)}
