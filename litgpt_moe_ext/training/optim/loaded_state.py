"""What a resumed optimizer keeps of its state beyond what torch's `load_state_dict` does."""

from typing import Any

import torch
from torch import Tensor


def keep_types_of_numbers(optimizer: torch.optim.Optimizer) -> None:
    """Have single numbers in a loaded state keep their type.

    torch casts all floating state but `step` to the type of its parameter. NAdam's product of momenta and ASGD's rates
    are float32 even beside bfloat16 weights, and a resumed run would go on with rounded ones.

    Args:
        optimizer: The optimizer.
    """
    loading: list[dict[str, Any]] = []

    def remember(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        loading[:] = [state]

    def restore(loaded: torch.optim.Optimizer) -> None:
        saved = loading.pop()
        names = [name for group in saved["param_groups"] for name in group["params"]]
        parameters = [parameter for group in loaded.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in saved["state"].get(name, {}).items():
                ours = loaded.state[parameter][key]
                if isinstance(value, Tensor) and value.ndim == 0 and ours.dtype != value.dtype:
                    loaded.state[parameter][key] = value.detach().to(ours.device, copy=True)

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)
