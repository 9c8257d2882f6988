"""Two ways to store the experts of a layer: stacked, and LitGPT's `LLaMAMoE` layout with a module per expert.

Shape legend: E experts.
"""

import torch
from torch import Tensor

# Name of each stacked weight, and the names of one expert's weights in LitGPT's layout: as in `LLaMAMLP` with a gated
# activation, as in `GptNeoxMLP` otherwise.
_PER_EXPERT = {
    "gate_up_proj": ("fc_1.weight", "fc_2.weight"),
    "gate_up_bias": ("fc_1.bias", "fc_2.bias"),
    "up_proj": ("fc.weight",),
    "up_bias": ("fc.bias",),
    "down_proj": ("proj.weight",),
    "down_bias": ("proj.bias",),
}


def stack_experts(state_dict: dict[str, Tensor], prefix: str, n_expert: int) -> None:
    """Replace LitGPT's per-expert weights under `prefix` by stacked ones, in place; does nothing if there are none.

    Args:
        state_dict: A state dictionary.
        prefix: Name of the experts module in it with a trailing dot (`transformer.h.0.mlp.experts.`).
        n_expert: Number of experts E.
    """
    for stacked, names in _PER_EXPERT.items():
        keys = [[f"{prefix}{e}.{name}" for name in names] for e in range(n_expert)]
        if all(key in state_dict for expert_keys in keys for key in expert_keys):
            # Detaching loads the tensors of LitGPT's commands, which are not in memory yet.
            experts = [torch.cat([torch.detach(state_dict.pop(key)) for key in expert_keys]) for expert_keys in keys]
            state_dict[prefix + stacked] = torch.stack(experts)


def unstack_experts(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of `state_dict` in which stacked experts are in LitGPT's per-expert layout (views, not copies)."""
    result = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        names = _PER_EXPERT.get(name) if prefix.endswith("experts") else None
        if names is None:
            result[key] = value
            continue
        for e, expert in enumerate(value.unbind()):
            result |= {
                f"{prefix}.{e}.{part}": tensor for part, tensor in zip(names, expert.chunk(len(names)), strict=True)
            }
    return result
