"""The size of an optimizer's state."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.recipe_files import class_path_of
from litgpt_moe_ext.training.optim.parameter_groups import MATRIX_PARTS, group_parameters
from litgpt_moe_ext.training.settings import ParameterGroupArgs

_MUON = "litgpt_moe_ext.training.optim.muon.MuonAdamW"
_FACTORED = "Adafactor"
# Numbers that optimizers store per parameter, by name without torch's prefix; those of MuonAdamW and Adafactor for what
# is not a matrix.
_STATE = {"Adam": 2, "AdamW": 2, _MUON: 2, _FACTORED: 1}


def state_of_modules(optimizer: str | dict[str, Any], model: nn.Module, ratio: int) -> Callable[[nn.Module], int]:
    """Return a function that counts the numbers which an optimizer stores for a module of a model.

    Args:
        optimizer: Name of the optimizer, or its `class_path` and `init_args`.
        model: The model; its parameters may have no values.
        ratio: What `state_ratio` says of the optimizer, asked where tensors have values: many steps read one.
    """
    matrices: set[int] = set()
    if class_path_of(optimizer) == _MUON:
        groups = group_parameters(model, ParameterGroupArgs(), split_matrices=True)
        matrices = {id(parameter) for group in groups if MATRIX_PARTS in group for parameter in group["params"]}

    factored = _name_of(optimizer) == _FACTORED

    def numbers(parameter: nn.Parameter) -> int:
        size = parameter.numel()
        if id(parameter) in matrices:
            return size  # Muon remembers one average
        if factored and parameter.dim() > 1:
            return size // parameter.size(-1) + size // parameter.size(-2)  # one for each row, and for each column
        return size * ratio

    return lambda module: sum(map(numbers, module.parameters()))


def state_ratio(optimizer: str | dict[str, Any], dtype: torch.dtype) -> int:
    """Return how many numbers an optimizer stores per parameter.

    It is known for the most common optimizers; others make a step, which loads torch's compiler.

    Args:
        optimizer: Name of the optimizer, or its `class_path` and `init_args`.
        dtype: Type of the parameters.

    Raises:
        SettingsError: If there is no such optimizer.
    """
    name = _name_of(optimizer)
    arguments = {} if isinstance(optimizer, str) else optimizer.get("init_args") or {}
    if name in _STATE and isinstance(arguments, dict) and not arguments.get("amsgrad"):
        return _STATE[name]
    return measure_state_ratio(optimizer, dtype)


def _name_of(optimizer: str | dict[str, Any]) -> str:
    return str(class_path_of(optimizer)).removeprefix("torch.optim.")


def measure_state_ratio(optimizer: str | dict[str, Any], dtype: torch.dtype) -> int:
    """Return the same for any optimizer, by making one step."""
    from litgpt.utils import instantiate_torch_optimizer

    from litgpt_moe_ext.training.optim.arguments import in_full, learning_rate_of

    learning_rate_of(optimizer)  # refuses anything else
    parameter = nn.Parameter(torch.zeros(8, 16, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    made = instantiate_torch_optimizer(copy.deepcopy(in_full(optimizer)), [parameter])
    try:
        made.step()
    except (TypeError, RuntimeError) as error:
        raise SettingsError(f"optimizer: {optimizer!r} cannot make a step: {one_line(error)}") from error
    state = made.state[parameter].values()
    return sum(value.numel() for value in state if isinstance(value, Tensor)) // parameter.numel()
