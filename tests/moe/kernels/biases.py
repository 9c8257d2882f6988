"""Balancing biases that the kernel moves, and where they must come to, for tests in the interpreter and on a card."""

import torch

from litgpt_moe_ext.moe.balancing.bias import scheduled_rate, updated_bias
from litgpt_moe_ext.moe.kernels.routing.balancing import Moved, move_biases

SCHEDULES = (
    None, {}, {"warmup_steps": 7}, {"decay_start": 3}, {"decay_start": 2, "decay_steps": 9},
    {"warmup_steps": 6, "decay_start": 4, "decay_steps": 5}, {"warmup_steps": 0, "decay_steps": 5},
)  # fmt: skip
# Whose sums float32 holds in any order.
RATE, GRID = 0.125, 64


def make_moved(L, E, schedule=None, tokens=0, grid=True, device="cpu"):
    """Return layers that have moved 0, 1, 2... times, in which some experts have as many tokens as the mean.

    Args:
        L: Layers.
        E: Experts.
        schedule: Of the rate.
        tokens: About how many tokens an expert has at least.
        grid: Whether biases are multiples of 1/64, rather than any numbers.
        device: Where they are to be.
    """
    biases = torch.randint(-GRID, GRID, (L, E)) / GRID if grid else torch.randn(L, E)
    more_LE = torch.randint(0, 4, (L, E))
    # What one expert has more than the mean another has less, and one without the other is alone with it.
    less_LE = more_LE.flip(1)
    middle = torch.arange(E) >= E // 2
    counts_LE = tokens + 4 + torch.where(middle, more_LE, -less_LE)
    counts_LE[0] += 2 * (torch.arange(E) == 0)  # a mean that is no integer
    records = torch.cat([counts_LE.double(), torch.full((L, 3), 1e9, dtype=torch.float64)], 1).to(device)
    updates = [] if schedule is None else [torch.tensor(n, device=device) for n in range(L)]
    return Moved([bias.to(device) for bias in biases], list(records), updates, RATE, schedule)


def compare(moved):
    """Move biases, and hold them against what torch's operators make of them on a CPU."""
    on_cpu = [torch.stack([x.cpu() for x in tensors]) for tensors in (moved.biases, moved.records)]
    n_expert, rate, versions = on_cpu[0].size(1), moved.rate, [bias._version for bias in moved.biases]
    before = torch.tensor([int(update) for update in moved.updates])
    if moved.schedule is not None:
        rate = scheduled_rate(rate, moved.schedule, before).unsqueeze(1)
    expected_LE = updated_bias(on_cpu[0], on_cpu[1][:, :n_expert], rate)
    move_biases(moved)
    biases_LE = torch.stack([bias.cpu() for bias in moved.biases])
    is_exact = moved.schedule is None and torch.equal(on_cpu[0] * GRID, (on_cpu[0] * GRID).round())
    # A schedule's rates are no multiples of anything; then the mean depends on the order of its sum.
    unit = 0.0 if is_exact else 2**-23 * expected_LE.abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(biases_LE, expected_LE, rtol=0, atol=2 * unit)
    assert [int(update) for update in moved.updates] == (before + 1).tolist()
    # As autograd has to know.
    assert all(bias._version > version for bias, version in zip(moved.biases, versions, strict=True))
    return biases_LE


def compare_rates(schedule, device):
    """Hold the rates of a schedule against torch's, to the last bit: without a bias, two experts go so far."""
    moved = make_moved(16, 2, schedule, device=device)
    for bias, record in zip(moved.biases, moved.records, strict=True):
        bias.zero_()
        record[:2] = torch.tensor([3.0, 1.0])
    rates = scheduled_rate(RATE, schedule, torch.arange(16))
    assert torch.equal(compare(moved), torch.stack([-rates, rates], dim=1))
