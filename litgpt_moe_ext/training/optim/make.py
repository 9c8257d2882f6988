"""Makes the optimizer of a run."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from litgpt.utils import instantiate_torch_optimizer
from torch import Tensor, nn

from litgpt_moe_ext.host.without_compiler import bare_step, replace_step
from litgpt_moe_ext.training.optim.arguments import fuses_on_shards, in_full, is_muon
from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.optim.loaded_state import keep_types_of_numbers
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters, keep_kernel_options, scale_rates
from litgpt_moe_ext.training.optim.shards import is_shard
from litgpt_moe_ext.training.settings import ParameterGroupArgs
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, run_now


def make_optimizer(
    optimizer: str | dict,
    model: nn.Module,
    args: ParameterGroupArgs,
    run_task: Callable[[GradientTask], Tensor | None] = run_now,
    steps_in_parts: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer for a model that was set up.

    Args:
        optimizer: Name, or class path and arguments.
        model: The model.
        args: Settings of the parameter groups.
        run_task: Does work on gradients, possibly as a CUDA graph.
        steps_in_parts: Whether one step calls the optimizer several times, as DeepSpeed does; if so, the caller scales
            the learning rates.
    """
    optimizer, parameters = in_full(optimizer), list(model.parameters())
    given = optimizer["init_args"] if isinstance(optimizer, dict) else {}
    extra = {}
    if "fused" not in given and "foreach" not in given and _can_fuse(optimizer, parameters):
        extra["fused"] = True
    made = _instantiate(optimizer, group_parameters(model, args, split_matrices=is_muon(optimizer)), **extra)
    # A gradient scaler would leave unscaling to a fused optimizer: too late for clipping, so Fabric refuses it.
    made._step_supports_amp_scaling = False  # pyrefly: ignore[missing-attribute] torch's fused optimizers have it
    made.register_load_state_dict_pre_hook(keep_kernel_options)
    keep_types_of_numbers(made)
    if not steps_in_parts:
        made.register_step_pre_hook(scale_rates)
    if "step" in vars(made):
        return made  # its own wrapper of the method, whose work would be lost
    if not steps_in_parts and any(parameter.is_cuda for parameter in parameters):
        GpuStep(made, run_task).install()
    else:
        replace_step(made, bare_step(made))
    return made


def _can_fuse(optimizer: str | dict, parameters: list[nn.Parameter]) -> bool:
    try:
        made = _instantiate(optimizer, parameters, fused=True)
    except RuntimeError:  # no fused kernel for this device or dtype
        return False
    return "fused" in made.defaults and (fuses_on_shards(type(made)) or not any(map(is_shard, parameters)))


def _instantiate(optimizer: str | dict, parameters: Any, **kwargs: Any) -> torch.optim.Optimizer:
    # A copy, because LitGPT's function adds the keyword arguments to the given dictionary.
    return instantiate_torch_optimizer(copy.deepcopy(optimizer), parameters, **kwargs)
