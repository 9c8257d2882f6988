"""Muon, and the AdamW of what is no matrix, on this card."""

import pytest
import torch

from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.optimization import Optimization
from litgpt_moe_ext.training.settings import ParameterGroupArgs, ScheduleArgs
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


@pytest.mark.parametrize("path", ["torch.optim.AdamW", "litgpt_moe_ext.training.optim.muon.MuonAdamW"])
def test_the_largest_are_stepped_first_on_a_card(device, path):
    """Where a launch of small ones is a short one; on a CPU nothing is gained."""
    model, seen = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 9)).to(device), []
    optimization = Optimization(ScheduleArgs(), ParameterGroupArgs(no_weight_decay=[]), scaled=False)
    optimization.on_after_setup(None, model)
    optimizer = optimization.make_optimizer({"class_path": path, "init_args": {"lr": 0.1}}, None)
    own = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.register_step_post_hook(lambda *_: seen.extend(list(group["params"]) for group in optimizer.param_groups))
    optimizer.step()
    sizes = [[parameter.numel() for parameter in parameters] for parameters in own]
    expected = [sorted(group, reverse=True) if device.type == "cuda" else group for group in sizes]
    assert [[parameter.numel() for parameter in parameters] for parameters in seen] == expected
    assert [group["params"] for group in optimizer.param_groups] == own
