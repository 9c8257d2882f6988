"""Checks an optimizer's settings, and finds its learning rate."""

import copy
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from litgpt_moe_ext.errors import SettingsError, did_you_mean, refuse_first
from litgpt_moe_ext.field_types import checked, members
from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.recipe_files import beside_a_class
from litgpt_moe_ext.training.parallel.accelerator import accelerator_here


def learning_rate_of(optimizer: str | dict) -> float:
    """Return the learning rate of an optimizer, made for a throw-away parameter.

    Raises:
        SettingsError: If it cannot be made, or cannot step the way LitGPT's loop calls it.
    """
    cls, arguments = _optimizer_class(optimizer)
    if reason := _obstacle(cls):
        raise SettingsError(f"optimizer: {cls.__name__} {reason}")
    known = dict(list(inspect.signature(cls).parameters.items())[1:])  # the first are those to train
    for name, value in arguments.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
            raise SettingsError(f"optimizer.init_args.{name}: {cls.__name__} has no such argument{hint}")
        _check_argument(f"optimizer.init_args.{name}", value, known[name])
    refuse_first(_fails_in_a_step(arguments))
    try:
        with without_compiler():
            made = cls([torch.nn.Parameter(torch.zeros(1))], **copy.deepcopy(arguments))
    except (TypeError, ValueError, RuntimeError) as error:
        # The class itself checks its arguments.
        raise SettingsError(f"optimizer: {optimizer!r} cannot be made: {error}") from error
    return made.defaults["lr"]


def obstacle_on_shards(optimizer: str | dict) -> str | None:
    """Return why an optimizer cannot step on FSDP2's shards of weights; None if it can."""
    cls, arguments = _optimizer_class(optimizer)
    if issubclass(cls, torch.optim.Adafactor):
        return "changes its states in ways that torch does not support for shards; use another, such as AdamW"
    if arguments.get("fused") and not fuses_on_shards(cls):
        return "has no fused kernel for shards; leave fused out"
    return None


def fuses_on_shards(optimizer: type) -> bool:
    """Return whether an optimizer's fused kernel works on shards too, as those of torch's Adam and AdamW do."""
    return issubclass(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def with_module(optimizer: str | dict) -> str | dict:
    """Return an optimizer by its full path, as LitGPT accepts short names only without arguments.

    Anything that names no optimizer is returned unchanged.
    """
    path = optimizer.get("class_path") if isinstance(optimizer, dict) else None
    if isinstance(optimizer, dict) and isinstance(path, str) and "." not in path:
        return {**optimizer, "class_path": f"torch.optim.{path}"}
    return optimizer


def in_full(optimizer: str | dict) -> str | dict:
    """Return an optimizer with the module and arguments that LitGPT's function needs but a recipe may omit."""
    named = with_module(optimizer)
    return named if isinstance(named, str) else {**named, "init_args": named.get("init_args") or {}}


def is_muon(optimizer: str | dict) -> bool:
    """Return whether an optimizer updates matrices by Muon, and so needs them in groups of their own."""
    from litgpt_moe_ext.training.optim.muon import MuonAdamW

    return issubclass(_optimizer_class(optimizer)[0], MuonAdamW)


def _obstacle(optimizer: type) -> str | None:
    if optimizer is torch.optim.Muon:
        from litgpt_moe_ext.training.optim.muon import MuonAdamW

        return f"takes matrices only; {MuonAdamW.__module__}.{MuonAdamW.__name__} has AdamW for the rest"
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return "computes the loss several times in a step, which LitGPT's loop does once; use another, such as AdamW"
    if optimizer is torch.optim.SparseAdam:
        return "takes sparse gradients only, and these are dense; use another, such as AdamW"
    return None


def _fails_in_a_step(arguments: dict[str, Any]) -> Iterator[str]:
    if arguments.get("differentiable"):
        yield (
            "optimizer.init_args.differentiable: true is for gradients of a step itself, which a training never takes; "
            "leave it out"
        )
    if arguments.get("capturable") and accelerator_here() == "cpu":
        yield "optimizer.init_args.capturable: true needs a GPU; leave it out: steps in CUDA graphs set it themselves"


def _check_argument(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise SettingsError unless a value has the type of a parameter's default; the class checks the range."""
    default = parameter.default
    if isinstance(default, bool) or set(members(parameter.annotation)) == {bool, type(None)}:
        checked(name, value, bool if isinstance(default, bool) else bool | None)
    elif isinstance(default, (int, float)):
        checked(name, value, float)
    elif isinstance(default, tuple):
        checked(name, value, list[float | None] if None in default else list[float])
        if len(value) != len(default):
            raise SettingsError(f"{name}: {value!r} must be {len(default)} numbers, such as {list(default)}")


def _optimizer_class(optimizer: str | dict) -> tuple[type, dict[str, Any]]:
    path, arguments = optimizer, {}
    if isinstance(optimizer, dict):
        path, arguments = optimizer.get("class_path"), optimizer.get("init_args") or {}
    names = all(isinstance(name, str) for name in arguments) if isinstance(arguments, dict) else False
    if not isinstance(path, str) or not names:
        raise SettingsError(f"optimizer: {optimizer!r} must be a name, or class_path and init_args")
    if isinstance(optimizer, dict):
        refuse_first(beside_a_class("optimizer", optimizer))
    module, _, name = path.rpartition(".")
    wrong = f"optimizer: {path!r} must be the name of a class in torch.optim, or the full path of another"
    try:
        found = getattr(importlib.import_module(module or "torch.optim"), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: a path that begins with a dot
        hint = "" if module else did_you_mean(path, torch.optim.__all__)
        raise SettingsError(f"{wrong} ({error}){hint}") from error
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise SettingsError(f"{wrong} (it is not an optimizer)")
    return found, arguments
