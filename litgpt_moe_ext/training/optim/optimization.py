"""Makes the optimizer of a run."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from litgpt.utils import instantiate_torch_optimizer

from litgpt_moe_ext.host.without_compiler import bare_step, replace_step
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.optim.arguments import fuses_on_shards, in_full, is_muon
from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters, scale_rates, with_own_kernels
from litgpt_moe_ext.training.optim.shards import is_shard
from litgpt_moe_ext.training.settings import ParameterGroupArgs

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric


class Optimization(Callback):
    """The optimizer side of a run.

    Args:
        groups: Settings of the parameter groups.
        in_pieces: Whether one step calls the optimizer several times, as DeepSpeed does; the caller scales the rates.
    """

    def __init__(self, groups: ParameterGroupArgs, in_pieces: bool = False) -> None:
        self._group_args, self._in_pieces = groups, in_pieces
        self._fabric: TrainingFabric
        self._model: torch.nn.Module

    def on_after_setup(self, fabric: TrainingFabric, module: torch.nn.Module) -> None:
        """Keep the model whose parameters will be optimized."""
        self._fabric, self._model = fabric, module

    def make_optimizer(self, optimizer: str | dict, _parameters: Any, **_kwargs: Any) -> torch.optim.Optimizer:
        """Return the optimizer for the model that was set up; called as LitGPT's `instantiate_torch_optimizer`.

        Args:
            optimizer: Name, or class path and arguments.
        """
        optimizer = in_full(optimizer)
        given = optimizer["init_args"] if isinstance(optimizer, dict) else {}
        groups = group_parameters(self._model, self._group_args, split_matrices=is_muon(optimizer))
        extra = {}
        if "fused" not in given and "foreach" not in given and self._can_fuse(optimizer):
            extra["fused"] = True
        made = _instantiate(optimizer, groups, **extra)
        # A gradient scaler would leave unscaling to a fused optimizer: too late for clipping, so Fabric refuses it.
        made._step_supports_amp_scaling = False  # pyrefly: ignore[missing-attribute] torch's fused optimizers have it
        made.register_load_state_dict_pre_hook(with_own_kernels)
        if not self._in_pieces:
            made.register_step_pre_hook(scale_rates)
        if "step" in vars(made):
            return made  # its own wrapper of the method, whose work would be lost
        if not self._in_pieces and any(parameter.is_cuda for parameter in self._model.parameters()):
            GpuStep(made, self._fabric.run_task).install()
        else:
            replace_step(made, bare_step(made))
        return made

    def _can_fuse(self, optimizer: str | dict) -> bool:
        parameters = list(self._model.parameters())
        try:
            made = _instantiate(optimizer, parameters, fused=True)
        except RuntimeError:  # no fused kernel for this device or dtype
            return False
        return "fused" in made.defaults and (fuses_on_shards(type(made)) or not any(map(is_shard, parameters)))


def _instantiate(optimizer: str | dict, parameters: Any, **kwargs: Any) -> torch.optim.Optimizer:
    # A copy, because LitGPT's function adds the keyword arguments to the given dictionary.
    return instantiate_torch_optimizer(copy.deepcopy(optimizer), parameters, **kwargs)
