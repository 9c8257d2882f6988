"""What follows the backward pass of a step waits for no device: on cards that are not there, every look is an error."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Fabric
from litgpt import GPT, Config
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.moe.balancing.metrics import load_metrics, routers_of
from litgpt_moe_ext.training.callbacks.ema import WeightAverage
from litgpt_moe_ext.training.callbacks.step_metrics import StepMetrics
from litgpt_moe_ext.training.optim.make import make_optimizer
from litgpt_moe_ext.training.settings import EmaArgs, ParameterGroupArgs
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import run_now
from litgpt_moe_ext.training.steps.losses import RunningMean
from tests.fake_cuda import RECIPES, fake_cuda
from tests.subsets import soon
from tests.training.steps.graphs.passes import LOOKS

# As others of the recipes, but larger, or without experts.
ALIKE = ("code-moe-800m", "nanogpt-tinystories")
SOON = ("code-moe-60m", "nanogpt-moe-tinystories")
MUON = {"class_path": "litgpt_moe_ext.training.optim.muon.MuonAdamW", "init_args": {}}


def number_of_steps(step):
    """Stand in for a look at the counter of an optimizer, which lies with the host."""
    assert step.device.type == "cpu"
    return 1.0


class NoWaits(TorchDispatchMode):
    """Forbids whatever makes the host wait: looks at values, and copies between the devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in LOOKS, name
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "_copy_from"):
            tensors = [tensor for tensor in (*args, result) if isinstance(tensor, torch.Tensor)]
            assert len({tensor.device.type for tensor in tensors}) == 1, f"{name} between devices"
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype not in (torch.bool, torch.uint8) for index in indices), f"{name} by a mask"
        return result


class NotedCopies(TorchDispatchMode):
    """Notes from where something is copied to the host, and forbids looks elsewhere; there a fake tensor ends it."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in LOOKS or args[0].device.type == "cpu", name
        result = func(*args, **(kwargs or {}))
        if name == "_to_copy" and result.device.type == "cpu":
            self.copies.append(args[0].device.type)
        return result


def trained_model(recipe):
    """Return a recipe's model as a backward pass leaves it: with gradients, and routers that have counted."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
        model = GPT(Config(**settings["model_config"]))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for router in routers_of(model).values():
        leaf_N = router.tally.leaf_on(torch.device("cuda", 0))
        leaf_N.grad = torch.empty_like(leaf_N)
    return model, settings


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "muon"])
@pytest.mark.parametrize(
    "recipe",
    soon((recipe for recipe in RECIPES if recipe.stem not in ALIKE), SOON, lambda recipe: recipe.stem),
    ids=lambda r: r.stem,
)
def test_no_step_waits_after_its_backward_pass(recipe, muon, monkeypatch):
    """Clipping, optimizer, balancing of experts, average of the weights and mean of the losses."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_value", number_of_steps)
    with fake_cuda((9, 0)), torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        # torch says what this does to tensors without contents only for rates that are numbers.
        library.impl("_fused_adamw_.tensor_lr", lambda *args, **kwargs: None)
        model, settings = trained_model(recipe)
        tasks = []

        def run_task(task):
            tasks.append(task.name)
            return run_now(task)

        fabric = SimpleNamespace(device=torch.device("cuda", 0), print=print)
        named = MUON if muon else {"init_args": {}, **settings["optimizer"]}
        optimizer = make_optimizer(named, model, ParameterGroupArgs(), run_task)
        average, norms, losses = WeightAverage(EmaArgs(decay=0.99)), StepMetrics(fabric, 1), RunningMean(4)
        average.on_after_setup(fabric, model)
        average.on_fit_begin(None)
        for scope in (contextlib.nullcontext(), NoWaits()):  # the first step makes the optimizer's state
            gradients = {parameter: parameter.grad for parameter in model.parameters()}
            with scope:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                norms.on_gradients_clipped(norm, model, optimizer, scaled=False)
                optimizer.step()
                average.on_after_optimizer_step(None, optimizer)
                losses.update(norm)
                losses.compute()
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for router in routers_of(model).values():
                assert not router.tally.pending
                leaf_N = router.tally.leaf_on(fabric.device)
                leaf_N.grad = torch.empty_like(leaf_N)
        assert tasks == ["the optimizer"] * 2, "which a graph may replay"
        routers = list(routers_of(model).values())
        assert all(router.record is not None for router in routers)
        if routers:
            with pytest.raises((AssertionError, DataDependentOutputException)), NoWaits():
                float(routers[0].record.sum())
            copies = []
            with pytest.raises(DataDependentOutputException), NotedCopies(copies):
                load_metrics(model)
            assert copies == ["cuda"]  # one for all layers
