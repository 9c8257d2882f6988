"""Checks and reports the kernels that a run will use, before the first step."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from litgpt_moe_ext.attention.kernels.choice import FALLBACK_COST, fallback_is_known
from litgpt_moe_ext.attention.kernels.own import EAGER
from litgpt_moe_ext.attention.layer import SinkAttention
from litgpt_moe_ext.config.fields import BACKEND_FIELDS
from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.training.callback import Callback

if TYPE_CHECKING:
    import lightning as L

    from litgpt_moe_ext.training.phases.launch import Launched


class KernelReport(Callback):
    """Print which implementation computes the experts and which the attention, one line each.

    Args:
        compiled: Whether the model is compiled, which may change the implementation of the experts.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def on_after_setup(self, fabric: "L.Fabric", module: nn.Module) -> None:
        """Ask the layers of the model on its device and in its precision."""
        with fabric.autocast():
            for line in (experts_line(module, fabric.device, self._compiled), attention_line(module, fabric.device)):
                if line is not None:
                    fabric.print(line)
                    if FALLBACK_COST in line:
                        fallback_is_known(_dtype(_attention_layers(module)[0], fabric.device), fabric.device)


def check_kernels(launched: "Launched") -> None:
    """Refuse a kernel that the configuration names but this device lacks, before anything is prepared or moved.

    Raises:
        SettingsError: If `expert_backend` or `attention_backend` cannot work here in the run's precision.
    """
    config, fabric = launched.plan.config, launched.fabric
    if all(getattr(config, name, None) is None for name in BACKEND_FIELDS):
        return
    with fabric.init_tensor():
        dtype = torch.empty(0).dtype
    model = meta_model(config).to(dtype)
    with fabric.autocast():
        experts_line(model, fabric.device, compiled=False)
        attention_line(model, fabric.device)


def experts_line(model: nn.Module, device: torch.device, compiled: bool) -> str | None:
    """Return what computes the routed experts of `model` under the present autocast; None if it has none."""
    experts = next((module for module in model.modules() if isinstance(module, Experts)), None)
    if experts is None:
        return None
    x_TD = torch.empty(1, experts.n_embd, device=device, dtype=experts.down_proj.dtype)
    backend = experts.backend_for(x_TD, compiled)
    how = "forced" if experts.forced_backend else "chosen"
    blocks = _measured_blocks(experts, device) if backend == "triton" and device.type == "cuda" else ""
    return f"experts: {backend} for {matmul_dtype(x_TD)} on {device.type} ({how}{blocks})"


def _measured_blocks(experts: Experts, device: torch.device) -> str:
    """Say for how many tokens `litgpt-moe tune` has measured blocks for such experts on this card."""
    from litgpt_moe_ext.moe.kernels.triton.tiling.tuned_tiles import read

    works = [work for works in read(device) for work in works]
    sizes = {
        work.n_row // work.top_k
        for work in works
        if work.n_expert == experts.n_expert and experts.n_embd in (work.n_out, work.n_in)
    }
    return f", blocks measured for {' and '.join(f'{size:,}' for size in sorted(sizes))} tokens" if sizes else ""


def attention_line(model: nn.Module, device: torch.device) -> str | None:
    """Return what computes the attention of `model` under the present autocast; None if it is not the plugin's."""
    layers = _attention_layers(model)
    if not layers:
        return None
    dtype = _dtype(layers[0], device)
    # Layers with and without a sliding window may differ.
    kernels = dict.fromkeys(layer.kernel(device, dtype) for layer in layers)
    is_forced = getattr(layers[0].config, "attention_backend", None) is not None
    line = f"attention: {' and '.join(kernels)} for {dtype} on {device.type} ({'forced' if is_forced else 'chosen'})"
    return f"{line}: {FALLBACK_COST}" if EAGER in kernels and not is_forced else line


def _attention_layers(model: nn.Module) -> list[SinkAttention]:
    return [module for module in model.modules() if isinstance(module, SinkAttention)]


def _dtype(layer: SinkAttention, device: torch.device) -> torch.dtype:
    """Return the type of a layer's queries, keys and values under the present autocast."""
    return matmul_dtype(torch.empty(0, device=device, dtype=layer.proj.weight.dtype))
