"""How evenly tokens are spread over experts.

Shape legend: L layers, E experts.
"""

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.moe.routers import Router


def max_over_mean(load_LE: Tensor) -> Tensor:
    """Return max(load) / mean(load) over the last dimension: 1 is perfect balance, E is total collapse (for K = 1).

    MaxVio of arXiv:2408.15664 (equation 4) is this minus 1.
    """
    return load_LE.amax(dim=-1) / load_LE.mean(dim=-1).clamp(min=torch.finfo(load_LE.dtype).tiny)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Return the plugin's routers in `model` by module name, in order of depth."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def load_metrics(model: nn.Module) -> dict[str, float]:
    """Return the balance of the last optimizer step for a logger; waits for the device, so call it at log intervals.

    Keys: `moe/max_over_mean` (worst layer), `moe/max_over_mean_avg` (mean over layers), `moe/dead_experts` (experts
    without a single token, over all layers) and `moe/bias_range` (largest minus smallest balancing bias, worst layer;
    only with a balancing bias); auxiliary losses by name, such as `moe/importance_loss`, with their weights and summed
    over layers (of the last batch of this process). Empty before the first step and for models without the plugin's MoE
    layers.
    """
    routers = [router for router in routers_of(model).values() if router.load_E is not None]
    if not routers:
        return {}
    load_LE = torch.stack([router.load_E for router in routers]).cpu()
    balance_L = max_over_mean(load_LE)
    metrics = {
        "moe/max_over_mean": balance_L.max().item(),
        "moe/max_over_mean_avg": balance_L.mean().item(),
        "moe/dead_experts": int((load_LE == 0).sum()),
    }
    biases = [router.e_score_correction_bias for router in routers if router.bias_update_rate]
    if biases:
        bias_LE = torch.stack(biases).cpu()
        metrics["moe/bias_range"] = (bias_LE.amax(-1) - bias_LE.amin(-1)).max().item()
    for router in routers:
        for name, loss in router.auxiliary_losses.items():
            metrics[f"moe/{name}"] = metrics.get(f"moe/{name}", 0.0) + loss.item()
    return metrics
