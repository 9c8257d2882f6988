"""What a run says about the kernels it will use, before the first step."""

from typing import Any

import lightning as L
import torch
from torch import nn

from litgpt_moe_ext.attention.kernels.backends import choose_backend
from litgpt_moe_ext.attention.layer import SinkAttention
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels.backends import matmul_dtype
from litgpt_moe_ext.training.callback import Callback


class KernelReport(Callback):
    """Print which implementation computes the experts and which the attention, one line each.

    Args:
        compiled: Whether the model is compiled, for which another implementation of the experts may be chosen.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def on_after_setup(self, fabric: L.Fabric, module: nn.Module) -> None:
        """Ask the layers of the model as it will train: on its device, in its precision."""
        with fabric.autocast():
            for line in (experts_line(module, fabric.device, self._compiled), attention_line(module, fabric.device)):
                if line is not None:
                    fabric.print(line)


def experts_line(model: nn.Module, device: torch.device, compiled: bool) -> str | None:
    """Return what computes the routed experts of `model` under the present autocast; None if it has none."""
    experts = next((module for module in model.modules() if isinstance(module, Experts)), None)
    if experts is None:
        return None
    x_TD = torch.empty(1, experts.n_embd, device=device, dtype=experts.down_proj.dtype)
    choose = experts.backend_for
    if compiled:
        # The choice depends on whether a compiler traces it, so one does; the sum gives it something to compile.
        choose = torch.compile(lambda x: (experts.backend_for(x), x + 1)[0], backend="eager")
    how = "forced" if experts.forced_backend else "chosen"
    return f"experts: {choose(x_TD)} for {matmul_dtype(x_TD)} on {device.type} ({how})"


def attention_line(model: nn.Module, device: torch.device) -> str | None:
    """Return what computes the attention of `model` under the present autocast; None if it is not the plugin's."""
    attention = next((module for module in model.modules() if isinstance(module, SinkAttention)), None)
    if attention is None:
        return None
    config: Any = attention.config
    dtype = matmul_dtype(torch.empty(0, device=device, dtype=attention.proj.weight.dtype))
    q_BHTD, k_BGSD = (
        torch.empty(1, heads, 2, config.head_size, device=device, dtype=dtype)
        for heads in (config.n_head, config.n_query_groups)
    )
    forced = config.attention_backend
    backend = choose_backend(q_BHTD, k_BGSD, k_BGSD, dropout=config.attention_dropout or 0.0, forced=forced)
    return f"attention: {backend} for {dtype} on {device.type} ({'forced' if forced else 'chosen'})"
