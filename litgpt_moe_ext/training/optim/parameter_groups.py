"""Sorting a model's parameters into the groups that an optimizer treats alike."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from litgpt_moe_ext.training.settings import ParameterGroupArgs

LR_FACTOR = "lr_factor"
MATRIX_PARTS = "matrix_parts"
OF_KERNELS = ("fused", "foreach")
"""Options of a group that choose the optimizer's kernels."""


def group_parameters(model: nn.Module, args: ParameterGroupArgs, split_matrices: bool = False) -> list[dict[str, Any]]:
    """Return the parameters of a LitGPT model as an optimizer's `param_groups`, in a reproducible order.

    Args:
        model: The model; wrappers of `torch.compile` and of distributed strategies do not matter.
        args: What to distinguish.
        split_matrices: Whether to put the matrices and stacks of matrices for Muon into groups of their own, with the
            key `matrix_parts`: the number of matrices concatenated in each. Not for Muon are embeddings, the output
            head, the routers' gates, and vectors, including matrices of one row such as the gate of shared experts.

    Returns:
        Groups with `params`, and `weight_decay` and `lr_factor` where they differ from the optimizer's defaults.
    """
    members: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter, owner in _trainable_parameters(model):
        kind = _kind(name, parameter, owner)
        factor = args.router_lr_factor if kind == "router" else 1.0
        parts = _matrix_parts(name, parameter) if split_matrices and kind == "matrix" else 0
        members[kind in args.no_weight_decay, factor, parts].append(parameter)
    groups = []
    for (without_decay, factor, parts), parameters in members.items():
        group: dict[str, Any] = {"params": parameters}
        if without_decay:
            group["weight_decay"] = 0.0
        if factor != 1.0:
            group[LR_FACTOR] = factor
        if parts:
            group[MATRIX_PARTS] = parts
        groups.append(group)
    return groups


def keep_kernel_options(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state to load with the optimizer's present kernel options; a hook for `load_state_dict`.

    Which kernels work depends on strategy, device and precision, which may differ from the checkpoint's.
    """
    if len(state["param_groups"]) != len(optimizer.param_groups):
        return state  # torch refuses it
    groups = [
        {**loaded, **{name: own[name] for name in OF_KERNELS if name in own}}
        for own, loaded in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {**state, "param_groups": groups}


def scale_rates(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Multiply every group's learning rate by its own factor; a pre-hook of `optimizer.step`.

    LitGPT's loop sets the rates anew before each step.
    """
    for group in optimizer.param_groups:
        if LR_FACTOR in group:
            group["lr"] = group["lr"] * group[LR_FACTOR]


def _trainable_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, nn.Module]]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{name}", parameter, module


def _kind(name: str, parameter: nn.Parameter, owner: nn.Module) -> str:
    if isinstance(owner, nn.Embedding) or ".lm_head." in f".{name}":
        return "embeddings" if name.endswith("weight") else "biases"
    if type(owner).__name__.endswith("Norm"):
        return "norms"
    # `sinks` and biases are added to logits or outputs; those of stacked experts are two-dimensional.
    if name.endswith(("bias", "sinks")):
        return "biases"
    if ".mlp.gate." in name:
        return "router"
    return "matrix" if parameter.ndim >= 2 else "other"


def _matrix_parts(name: str, parameter: nn.Parameter) -> int:
    # In experts, the gate and up projections are concatenated.
    parts = 2 if name.endswith("gate_up_proj") else 1
    # A vector has a single singular value: Muon would only normalise its gradient.
    is_vector = 1 in (parameter.size(-2) // parts, parameter.size(-1))
    return 0 if is_vector else parts
