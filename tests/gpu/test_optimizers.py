"""Muon, and the AdamW of what is no matrix, on this card."""

import contextlib

import pytest
import torch

from litgpt_moe_ext.training.optim.make import make_optimizer
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters
from litgpt_moe_ext.training.settings import ParameterGroupArgs
from tests.gpu.card import no_waits

pytestmark = pytest.mark.gpu

SETTINGS = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 0.01}


def test_the_rest_is_adamw(device):
    """As torch's on a CPU, also when it goes on from a state of a CPU, and a CPU from its own."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((70_000,), (5, 3), (7,))]
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    second = torch.optim.AdamW(theirs, **SETTINGS)

    ours = [torch.nn.Parameter(start.clone()) for start in starts]
    first = MuonAdamW(ours, **SETTINGS)
    for place in ("cpu", device, "cpu", device):
        ours = [torch.nn.Parameter(parameter.detach().to(place)) for parameter in ours]
        moved = MuonAdamW(ours, **SETTINGS)
        moved.load_state_dict(first.state_dict())
        first = moved
        for _ in range(2):
            for parameter, expected in zip(ours, theirs, strict=True):
                expected.grad = torch.randn_like(expected)
                parameter.grad = expected.grad.to(place)
            first.step()
            second.step()
        for parameter, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(parameter.cpu(), expected)


def test_a_step_waits_for_nothing(device):
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(3, 8, 4, device=device))], "matrix_parts": 2},
        {"params": [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((9, 4), (4,))]},
    ]
    optimizer = MuonAdamW(groups, **SETTINGS)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # makes the states
    with no_waits(device):
        optimizer.step()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "litgpt_moe_ext.training.optim.muon.MuonAdamW"])
def test_a_run_steps_as_the_optimizer_itself(device, name):
    """With the rate as a number; a card reads it from its own memory, in float32, where an optimizer can."""
    models = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 9)).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    path = name if "." in name else f"torch.optim.{name}"
    ours = make_optimizer({"class_path": path, "init_args": {"lr": 0.1}}, models[0], ParameterGroupArgs())
    theirs = type(ours)(group_parameters(models[1], ParameterGroupArgs(), split_matrices="Muon" in name), lr=0.1)
    for i in range(3):
        for model in models:
            torch.manual_seed(i)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (i + 1)
        with no_waits(device) if i else contextlib.nullcontext():
            ours.step()
        theirs.step()
    for parameter, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
