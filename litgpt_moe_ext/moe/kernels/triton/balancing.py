"""Moves the balancing biases of many layers in one launch, by the rule of `litgpt_moe_ext.moe.balancing.bias`.

The comparison of counts with their mean is exact. Counts and their sum are integers, which float64 holds up to 2^53; a
mean that is an integer is not rounded, and any other is at least 1/E from the nearest integer, more than the rounding
error. The mean of a bias is a float64 sum too, so the order of its additions does not show.

Shape legend: E experts, L layers, N numbers of a record.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from litgpt_moe_ext.kernels.launch import launch, power_of_two
from litgpt_moe_ext.moe.kernels.routing.balancing import Moved
from litgpt_moe_ext.moe.kernels.triton.common import constexpr

# Layers per launch. Each takes three addresses, and the arguments of a kernel are limited to 4 KiB.
_MOST_LAYERS = 128


class _Form(NamedTuple):
    # A schedule, with 0 for missing settings.
    experts: int
    warmup_steps: int = 0
    decay_start: int = 0
    decay_steps: int = 0


def move_biases(moved: Moved) -> None:
    """Move all biases and count the update; see `litgpt_moe_ext.moe.kernels.routing.balancing`."""
    n_expert, schedule = moved.biases[0].numel(), dict(moved.schedule or {})
    if "decay_start" in schedule:
        schedule["decay_steps"] = max(schedule.get("decay_steps", 0), 1)
    else:
        schedule.pop("decay_steps", None)
    experts = max(power_of_two(n_expert), 32)
    form, warps = _Form(experts, **schedule), max(experts // 128, 1)
    torch.autograd.graph.increment_version([*moved.biases, *moved.updates])
    for first in range(0, len(moved.biases), _MOST_LAYERS):
        biases, records, updates = (
            tuple(tensors[first : first + _MOST_LAYERS]) for tensors in (moved.biases, moved.records, moved.updates)
        )
        arguments = biases, records, updates or None, n_expert, float(moved.rate), form
        launch(_move, (len(biases),), arguments, warps)


@triton.jit
def _of_layer(addresses):
    # Addresses are arguments, because a table on the device would have to follow every tensor.
    address = addresses[0]
    for layer in tl.static_range(1, len(addresses)):
        address = tl.where(tl.program_id(0) == layer, addresses[layer], address)
    return address


@triton.jit
def _quotient(n, D: constexpr):
    return tl.div_rn(n.to(tl.float32), tl.full((), D, tl.float32))


@triton.jit
def _next_rate(updates, rate, FORM: constexpr):
    # `litgpt_moe_ext.moe.balancing.bias.scheduled_rate`, rounded as torch does on a CPU.
    update = _of_layer(updates)
    n = tl.load(update)
    factor = tl.full((), 1.0, tl.float32)
    if FORM.warmup_steps != 0:
        factor = tl.minimum(_quotient(n + 1, FORM.warmup_steps), 1.0)
    if FORM.decay_steps != 0:
        past = tl.maximum(n - FORM.decay_start + 1, 0)
        factor *= tl.maximum(1.0 - _quotient(past, FORM.decay_steps), 0.0)
    # Every thread loads it before one stores.
    tl.debug_barrier()
    tl.store(update, n + 1)
    return rate * factor


@triton.jit
def _move(biases, records, updates, n_expert, rate, FORM: constexpr):
    bias, record = _of_layer(biases), _of_layer(records)
    e_E = tl.arange(0, FORM.experts)
    real_E = e_E < n_expert
    if updates is not None:
        rate = _next_rate(updates, rate, FORM)
    load_E = tl.load(record + e_E, mask=real_E, other=0.0)
    bias_E = tl.load(bias + e_E, mask=real_E, other=0.0)
    mean = tl.sum(load_E, 0) / n_expert
    bias_E += tl.where(load_E < mean, rate, 0.0) - tl.where(load_E > mean, rate, 0.0)
    centre = tl.sum(tl.where(real_E, bias_E, 0.0).to(tl.float64), 0) / n_expert
    tl.store(bias + e_E, bias_E - centre.to(tl.float32), mask=real_E)
