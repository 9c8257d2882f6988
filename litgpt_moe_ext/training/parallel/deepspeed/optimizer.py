"""The optimizer that LitGPT's loop sees when DeepSpeed takes the steps."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from litgpt_moe_ext.moe.balancing.bias import leave_to_caller, update_routers
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.training.optim.parameter_groups import OF_KERNELS, scale_rates
from litgpt_moe_ext.training.parallel.deepspeed.shards import FlatShards, SplitShards


class ZeroOptimizer:
    """Acts like a torch optimizer: it has groups, `step`, and the state of a single process's optimizer.

    DeepSpeed calls the underlying torch optimizer several times per step, each time with some of its groups. So what
    must happen once per step happens here, not in that optimizer's hooks.

    Args:
        engine: DeepSpeed's engine.
        members: The weights of every group of the torch optimizer, before DeepSpeed replaced them.
        on_norm: Called after every step with the gradient norm before clipping, a scalar tensor; if it is not finite,
            DeepSpeed has skipped the step.
    """

    def __init__(self, engine: Any, members: list[list[nn.Parameter]], on_norm: Callable[[Tensor], None]) -> None:
        self._engine, self._members, self._on_norm = engine, members, on_norm
        self._torch_optimizer = engine.optimizer.optimizer
        self._routers = list(routers_of(engine.module).values())
        stage_3 = engine.zero_optimization_stage() == 3
        self.shards = SplitShards(engine.optimizer) if stage_3 else FlatShards(engine.optimizer, members)
        leave_to_caller(self._torch_optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's groups, whose learning rates may be set."""
        return self._torch_optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The torch optimizer's defaults."""
        return self._torch_optimizer.defaults

    def step(self) -> None:
        """Clip the gradients and take a step, unless one of them is not finite; move the balancing biases."""
        scale_rates(self._torch_optimizer, (), {})
        self._engine.step()
        self._on_norm(torch.as_tensor(self._engine.get_global_grad_norm(), device=self._engine.device))
        if self._engine.was_step_applied() and (pending := [r for r in self._routers if r.tally.pending]):
            update_routers(pending)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing, as DeepSpeed's step ends with it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict that a torch optimizer over the whole weights would have; every process must call this.

        Only the first process gets the states, on the CPU.
        """
        keep = dist.get_rank() == 0
        states, groups = {}, []
        for group, parameters in zip(self.param_groups, self._members, strict=True):
            first = len(states)
            for parameter in parameters:
                states[len(states)] = self._state_of(parameter, keep)
            options = {name: value for name, value in group.items() if name != "params"}
            groups.append({**options, "params": list(range(first, len(states)))})
        return {"state": states, "param_groups": groups} if keep else {}

    def _state_of(self, parameter: nn.Parameter, keep: bool) -> dict[str, Any]:
        # All shards step together, so values that are not per weight are the same for all.
        flat = self.shards.flats()[0]
        state = {}
        for key, value in self._torch_optimizer.state.get(flat, {}).items():
            if _per_weight(value):
                value = self.shards.gather(parameter, key)
            if keep:
                state[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        return state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a state that `state_dict`, or a torch optimizer over the same groups, returned.

        Raises:
            ValueError: If the groups differ.
        """
        before, now = [len(g["params"]) for g in saved["param_groups"]], [len(members) for members in self._members]
        if before != now:
            raise ValueError(f"the optimizer's groups have {before} weights in the checkpoint and {now} now")
        for group, loaded in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name not in ("params", *OF_KERNELS)})
        if not saved["state"]:
            return
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        pattern = saved["state"][indices[0]]
        for flat in self.shards.flats():
            self._torch_optimizer.state[flat] = {
                key: torch.zeros_like(flat) if _per_weight(value) else self._placed(value, flat)
                for key, value in pattern.items()
            }
        parameters = [parameter for members in self._members for parameter in members]
        for parameter, index in zip(parameters, indices, strict=True):
            for key, value in saved["state"][index].items():
                if _per_weight(value):
                    self.shards.scatter(parameter, value, key)

    def _placed(self, value: Any, flat: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        # As in torch.optim, counters are on the device only for fused kernels and CUDA graphs.
        beside_weights = any(group.get("fused") or group.get("capturable") for group in self.param_groups)
        return value.to(flat.device if beside_weights else "cpu", copy=True)


def _per_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
