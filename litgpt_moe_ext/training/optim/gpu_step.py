"""Optimizer steps on a GPU.

- A step takes the largest weights of a group first. One launch of a fused optimizer takes 36 tensors and lasts as long
  as its largest block, of up to 65,536 elements: a launch of only norms and biases is short.
- Learning rates are on the device, for optimizers that can read them there. A CUDA graph would otherwise repeat those
  of its capture. They are there in every step, so that a step with a graph has the bits of one without.

Outside of a step, the groups are as LitGPT's loop and checkpoints expect them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.host.without_compiler import bare_step, replace_step
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.shards import is_shard
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, run_now


class GpuStep:
    """The step of an optimizer whose weights are on a GPU.

    Args:
        optimizer: The optimizer.
        run_task: Does work on gradients, possibly as a CUDA graph.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        run_task: Callable[[GradientTask], Tensor | None] = run_now,
    ) -> None:
        self._optimizer, self._run_task = optimizer, run_task
        self._step = bare_step(optimizer)
        self._ordered = [sorted(group["params"], key=torch.numel, reverse=True) for group in optimizer.param_groups]
        self._reads_rates = _can_read_rates(optimizer)
        self._rates: list[Tensor] = []

    def install(self) -> None:
        """Let the optimizer step this way."""
        replace_step(self._optimizer, self._take)

    def _take(self, _optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        with self._groups(params=self._ordered):
            if closure is not None or not self._reads_rates:
                return self._step(self._optimizer, closure)
            with self._groups(lr=self._rates_on_device()):
                self._run_task(GradientTask("the optimizer", self._run, self._depends_on))
        return None

    def _run(self) -> None:
        # torch's optimizers want to be told that they are captured, and warn if told so when they are not.
        on_gpu = "capturable" in self._optimizer.defaults and self._ordered[0][0].is_cuda
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        with self._groups(capturable=[True] * len(self._ordered)) if capturing else contextlib.nullcontext():
            self._step(self._optimizer)

    def _rates_on_device(self) -> list[Tensor]:
        """Return the learning rate of each group, a float32 scalar on the device."""
        if not self._rates:
            self._rates = [torch.empty((), dtype=torch.float32, device=group[0].device) for group in self._ordered]
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])  # a copy from the host might wait
        return self._rates

    def _depends_on(self) -> tuple:
        """Return the addresses of weights and states, and all settings but learning rates."""
        addresses, settings = [], []
        for group in self._optimizer.param_groups:
            settings.append([(name, value) for name, value in group.items() if name not in ("params", "lr")])
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                addresses += [parameter.data_ptr()]
                addresses += [value.data_ptr() for value in state.values() if isinstance(value, Tensor)]
        return addresses, settings

    @contextlib.contextmanager
    def _groups(self, **values: list[Any]) -> Iterator[None]:
        """Within the scope, set options of the groups, each given as a list of one value per group."""
        # Loading a state replaces the groups.
        groups = self._optimizer.param_groups
        own = {name: [group[name] for group in groups] for name in values}
        try:
            _give(groups, values)
            yield
        finally:
            _give(groups, own)


def _give(groups: list[dict[str, Any]], values: dict[str, list[Any]]) -> None:
    for name, column in values.items():
        for group, value in zip(groups, column, strict=True):
            group[name] = value


def _can_read_rates(optimizer: torch.optim.Optimizer) -> bool:
    if any(is_shard(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        return False  # torch does not take whole tensors and shards together
    fused = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
    return fused or isinstance(optimizer, MuonAdamW)
