"""Optimizer steps of GPUs, taken on a CPU: sorted weights, rates in tensors, and what a graph would repeat."""

import contextlib
from functools import partial

import pytest
import torch

from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.parameter_groups import LR_FACTOR, MATRIX_PARTS, scale_rates

SHAPES = [(3,), (4, 5), (2,), (4, 5), (7, 3)]
# On a CPU that of AdamW reads a rate from a tensor as on a GPU.
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "fused AdamW": partial(torch.optim.AdamW, fused=True),
    "fused Adam": partial(torch.optim.Adam, fused=True, weight_decay=0.1),
    "Muon": MuonAdamW,
}
READ_RATES = ("fused AdamW", "fused Adam", "Muon")


def made(kind, run_task=None, **settings):
    """Return an optimizer of two groups, and its parameters in the model's order."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    vectors = {"params": [parameter for parameter in parameters if parameter.ndim == 1], LR_FACTOR: 0.5}
    matrices = {"params": [parameter for parameter in parameters if parameter.ndim == 2]}
    if kind == "Muon":
        matrices[MATRIX_PARTS] = 1
    optimizer = OPTIMIZERS[kind]([matrices, vectors], lr=0.125, **settings)
    optimizer.register_step_pre_hook(scale_rates)
    if run_task is not None:
        GpuStep(optimizer, run_task).install()
    return optimizer, parameters


def step(optimizer, parameters, number, rate=0.125):
    """Take a step as LitGPT's loop does, which sets the rate before each."""
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_as_torch_does(kind):
    """With rates that float32 holds exactly; Muon rounds its changes before it adds them."""
    tasks = []

    def note(task):
        tasks.append(task)
        return task.run()

    optimizer, ours = made(kind, note)
    reference, theirs = made(kind)
    for number in range(4):
        step(optimizer, ours, number, rate=2.0**-number)
        step(reference, theirs, number, rate=2.0**-number)
    tolerance = 1e-6 if kind == "Muon" else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert len(tasks) == (4 if kind in READ_RATES else 0)
    # As they were made, with the rates of the last step, which checkpoints save.
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


def test_rates_of_shards_are_numbers(monkeypatch):
    monkeypatch.setattr("litgpt_moe_ext.training.optim.gpu_step.is_shard", lambda parameter: parameter.ndim == 2)
    optimizer, ours = made("fused AdamW", lambda task: pytest.fail("with rates in tensors"))
    reference, theirs = made("fused AdamW")
    step(optimizer, ours, 0)
    step(reference, theirs, 0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fails", [False, True])
def test_takes_the_largest_first(monkeypatch, kind, fails):
    """Outside of it, also if it fails, everything is in the order of the model, and the rates are numbers."""
    optimizer, parameters = made(kind)
    # What steps: hooks are called around it.
    whole, seen = type(optimizer).step.__wrapped__, []

    def noted(self, *args):
        seen.append([[list(parameter.shape) for parameter in group["params"]] for group in self.param_groups])
        seen.append([type(group["lr"]) for group in self.param_groups])
        if fails:
            raise RuntimeError("out of memory")
        return whole(self, *args)

    monkeypatch.setattr("litgpt_moe_ext.training.optim.gpu_step.bare_step", lambda _optimizer: noted)
    GpuStep(optimizer).install()
    optimizer.load_state_dict(made(kind)[0].state_dict())  # which replaces the groups
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        step(optimizer, parameters, 0)
    kept = torch.Tensor if kind in READ_RATES else float
    assert seen == [[[[7, 3], [4, 5], [4, 5]], [[3], [2]]], [kept, kept]]
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(one is parameters[i] for one, i in zip(listed, (1, 3, 4, 0, 2), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.0625]


@pytest.mark.parametrize("kind", READ_RATES)
def test_knows_only_during_a_capture_that_it_is_captured(monkeypatch, kind):
    """torch's optimizers ask to be told; Muon has no such setting."""
    optimizer, parameters = made(kind)
    seen = []

    def noted(self, *args):
        seen.append([group.get("capturable") for group in self.param_groups])

    monkeypatch.setattr("litgpt_moe_ext.training.optim.gpu_step.bare_step", lambda _optimizer: noted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    GpuStep(optimizer).install()
    before = [dict(group) for group in optimizer.param_groups]
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        step(optimizer, parameters, 0)
    assert seen == ([[None, None]] * 2 if kind == "Muon" else [[False, False], [True, True]])
    assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in before]
    assert not any(group.get("capturable") for group in optimizer.param_groups)


def test_a_closure_is_called():
    optimizer, parameters = made("fused AdamW", lambda task: pytest.fail("not with a closure"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("kind", READ_RATES)
def test_says_what_a_graph_would_repeat(kind):
    """Nothing changes from step to step once there are states, but for rates; any other setting does."""
    said = []
    optimizer, parameters = made(kind, lambda task: said.append(task.depends_on()) or task.run())

    def depends_on(number=0, **settings):
        for group in optimizer.param_groups:
            group.update(settings)
        step(optimizer, parameters, number, rate=1 / (number + 2))
        return said[-1]

    first, steady = depends_on(), depends_on(1)
    assert first != steady  # there were no states
    assert depends_on(2) == steady
    assert depends_on(3, weight_decay=0.5) != steady
    assert depends_on(4, weight_decay=0.1 if kind != "fused AdamW" else 0.01) == steady
    optimizer.state.clear()
    depends_on(5)
    assert depends_on(6) != steady  # new states, elsewhere; the old ones may have been given up
