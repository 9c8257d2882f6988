"""The auxiliary-loss-free bias that balances experts.

The balancing rule is from Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"
(arXiv:2408.15664, algorithm 1), as used by DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): after every optimizer step
the bias of an expert that received more tokens than the mean falls by a fixed rate, and the bias of an expert that
received fewer rises. The bias enters the choice of experts only, never the gate values, so no gradient is disturbed.

The tokens of a step are counted by `litgpt_moe_ext.moe.balancing.tally`. The bias moves in torch's global
optimizer-step hook, which works in any training loop.

Shape legend: E experts, L layers.
"""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale
from litgpt_moe_ext.moe.balancing.step_shares import begin_step
from litgpt_moe_ext.moe.balancing.tally import sum_over_ranks
from litgpt_moe_ext.moe.kernels.routing import balancing as kernels

if TYPE_CHECKING:
    from litgpt_moe_ext.moe.routing.router import Router


def updated_bias(bias_LE: Tensor, counts_LE: Tensor, rate: float | Tensor) -> Tensor:
    """Return the balancing bias after one optimizer step (arXiv:2408.15664, algorithm 1), centred.

    `bias + rate * sign(mean(counts) - counts)`, minus its mean: only differences between experts matter for the choice,
    and a centred bias cannot drift away as a whole.

    Args:
        bias_LE: Bias before the step, float32, last dimension over experts.
        counts_LE: Tokens per expert during the step, summed over gradient accumulation steps and ranks; any
            dtype, same shape.
        rate: Step size; 0.001 in the paper. A tensor broadcasts to the bias.
    """
    error_LE = counts_LE.mean(dim=-1, keepdim=True) - counts_LE
    bias_LE = bias_LE + rate * error_LE.sign().to(bias_LE.dtype)
    return bias_LE - bias_LE.mean(dim=-1, keepdim=True)


def scheduled_rate(rate: float, schedule: Mapping[str, int], updates: Tensor) -> Tensor:
    """Return the step size of the bias after `updates` updates.

    It rises linearly over `warmup_steps`, and from `decay_start` on falls linearly to 0 over `decay_steps`, at once if
    `decay_steps` is 0 (DeepSeek-V3 freezes its bias for the last part of the training, arXiv:2412.19437, section 4.2).

    Args:
        rate: The full step size.
        schedule: Any of the three names above, in optimizer steps.
        updates: int64; any shape.

    Returns:
        float32, the shape of `updates`.
    """
    factor = torch.ones_like(updates, dtype=torch.float32)
    if warmup_steps := schedule.get("warmup_steps", 0):
        factor = ((updates + 1) / warmup_steps).clamp(max=1.0)
    if "decay_start" in schedule:
        past = (updates - schedule["decay_start"] + 1).clamp(min=0)
        factor = factor * (1.0 - past / max(schedule.get("decay_steps", 0), 1)).clamp(min=0.0)
    return rate * factor


# Weak references in the order of construction, which is the same on every rank; the order matters because the
# counts of all routers travel in one all-reduce.
_routers: "list[weakref.ref[Router]]" = []
_warned_unowned: weakref.WeakSet = weakref.WeakSet()
_left_to_caller: weakref.WeakSet = weakref.WeakSet()


def watch(router: "Router") -> None:
    """Let the optimizer hook update `router` for as long as it lives."""
    _routers[:] = [reference for reference in _routers if reference() is not None]
    _routers.append(weakref.ref(router))


def any_router_lives() -> bool:
    """Return whether the process has a model with a router of this package."""
    return any(reference() is not None for reference in _routers)


def install_optimizer_hook() -> None:
    """Update router biases after every step of any optimizer, in any training loop. Called once, at registration."""
    register_optimizer_step_post_hook(_after_optimizer_step)


def leave_to_caller(optimizer: torch.optim.Optimizer) -> None:
    """Leave the biases alone when `optimizer` steps: its owner calls `update_routers` once per step.

    For owners such as DeepSpeed, which step it several times, each time with flat copies of some of the weights.
    """
    _left_to_caller.add(optimizer)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    forget_scale()
    if optimizer in _left_to_caller:
        return
    pending = [router for reference in _routers if (router := reference()) is not None and router.tally.pending]
    if not pending:
        return
    # Two models, or two optimizers on one model, may step at different times: a router follows the optimizer that owns
    # its gate. A router without a gate has only statistics to update.
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = [router for router in pending if router.weight is None or id(router.weight) in owned]
    if mine:
        update_routers(mine)
    else:
        _warn_unowned(pending, optimizer)


def _warn_unowned(routers: "list[Router]", optimizer: torch.optim.Optimizer) -> None:
    new = [router for router in routers if router.record is None and router not in _warned_unowned]
    if new:
        _warned_unowned.update(new)
        warnings.warn(
            f"{len(new)} MoE routers were trained on tokens, but {type(optimizer).__name__} does not hold their "
            "weights, so their balancing bias does not move. This is fine if another optimizer holds them or they are "
            "frozen on purpose; otherwise call litgpt_moe_ext.moe.balancing.bias.update_routers after each step.",
            RuntimeWarning,
            stacklevel=3,
        )


def begin_schedules(routers: "Iterable[Router]") -> None:
    """Restart the schedules of the bias update rates, for a run that starts from another run's weights."""
    for router in routers:
        if router.bias_update_schedule is not None:
            router.bias_updates.zero_()


def forget_step(routers: "Iterable[Router]") -> None:
    """Discard the tokens counted since the last optimizer step, because this step is skipped."""
    routers = list(routers)
    for router in routers:
        router.tally.take()
    begin_step(shares for router in routers if (shares := router.step_shares) is not None)


@torch.no_grad()
def update_routers(routers: "Iterable[Router]") -> None:
    """Take the tallies of `routers`, sum them over all ranks in one all-reduce, and move their balancing biases.

    Afterwards `router.record` holds the sums of the step, tokens per expert first. Does not wait for the device.

    Args:
        routers: Routers of one model, in the same order on every rank.
    """
    routers = list(routers)
    tallies = [router.tally.take() for router in routers]
    sums = torch.cat(tallies)
    sum_over_ranks(sums)
    by_settings = defaultdict(list)
    for router, record in zip(routers, sums.split([len(tally) for tally in tallies]), strict=True):
        router.record = record
        # Adapters are trained beside frozen gates, and their checkpoints hold no bias that would have moved.
        frozen = router.weight is not None and not router.weight.requires_grad
        if router.bias_update_rate and not frozen:
            by_settings[router.n_expert, router.bias_update_rate, str(router.bias_update_schedule)].append(router)
    for group in by_settings.values():
        _move_biases(group)
    begin_step(shares for router in routers if (shares := router.step_shares) is not None)


def _move_biases(routers: "list[Router]") -> None:
    """Move the biases of routers with the same settings."""
    rate, schedule = routers[0].bias_update_rate, routers[0].bias_update_schedule
    biases = [router.e_score_correction_bias for router in routers]
    records = [router.record for router in routers if router.record is not None]
    updates = [] if schedule is None else [router.bias_updates for router in routers]
    moved = kernels.Moved(biases, records, updates, rate, schedule)
    if all(router.own_kernels for router in routers) and kernels.works_on(moved):
        kernels.move_biases(moved)
        return
    if schedule is not None:
        rate = scheduled_rate(rate, schedule, torch.stack(updates)).unsqueeze(1)
        torch._foreach_add_(updates, 1)
    loads_LE = torch.stack([record[: routers[0].n_expert] for record in records])
    torch._foreach_copy_(biases, list(updated_bias(torch.stack(biases), loads_LE, rate)))
