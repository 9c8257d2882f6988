"""Shares of tokens for a load-balancing loss over the global batch (`router_load_balancing_loss_scope`).

Shape legend: E experts.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing.tally import counting_dtype, sum_over_ranks


class StepShares:
    """Each expert's share of the tokens of an optimizer step so far, over all ranks.

    The load-balancing loss is linear in these shares and no gradient passes through them, so they are needed in the
    backward pass only. By then every layer has counted its tokens in the forward pass: the first layer to go backward
    sums the counts of all layers over the ranks, in one all-reduce. Counts add up over accumulated micro-batches, and
    each micro-batch uses those up to its own, because later ones are not known yet (arXiv:2501.11873, section 3.1,
    "buffer").

    Forward passes repeated by activation checkpointing run within a backward pass and are not counted.

    Counts are added in place, so that passes captured as CUDA graphs keep adding to them.
    """

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._sums_E: Tensor | None = None
        self._has_counted = False
        self.handle = next(_handles)
        _step_shares[self.handle] = self

    def count(self, counts_E: Tensor) -> Tensor:
        """Count the tokens of a forward pass. Return `counts_E`, which compiled code must use from there on."""
        if torch.compiler.is_compiling():
            return torch.ops.litgpt_moe_ext.count_for_step(counts_E, self.handle)
        self._count(counts_E)
        return counts_E

    def _count(self, counts_E: Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._pending.append(counts_E)

    def shares(self, counts_E: Tensor) -> Tensor:
        """Return the shares, (E,) in float64 (float32 on devices without it); call it in the backward pass.

        Args:
            counts_E: What `count` returned.
        """
        if torch.compiler.is_compiling():
            return torch.ops.litgpt_moe_ext.shares_of_step(counts_E, self.handle)
        return self._shares(counts_E)

    def _shares(self, counts_E: Tensor) -> Tensor:
        if self._pending:
            add_up()
        sums_E = self._sums_E if self._sums_E is not None and self._has_counted else counts_E
        return sums_E / sums_E.sum().clamp(min=1)

    def _add(self, sums_E: Tensor) -> None:
        if self._sums_E is None or self._sums_E.device != sums_E.device:
            self._sums_E = torch.zeros_like(sums_E)
        self._sums_E += sums_E
        self._pending.clear()
        self._has_counted = True

    def __reduce__(self) -> tuple:
        # A copy gets a handle of its own, and starts without counts.
        return StepShares, ()


def _collect(members: list[StepShares]) -> None:
    # In the order of construction, the same on every rank.
    counts = [sum(member._pending[1:], member._pending[0]) for member in members]
    sums = torch.cat(counts).to(counting_dtype(counts[0].device))
    sum_over_ranks(sums)
    for member, sums_E in zip(members, sums.split([len(counts_E) for counts_E in counts]), strict=True):
        member._add(sums_E)


def add_up() -> None:
    """Add up the counts of forward passes since the last backward pass, as the next backward pass would.

    Call it before capturing passes: they add up all pending counts, and would do so again in every replay.
    """
    if members := [shares for shares in _step_shares.values() if shares._pending]:
        _collect(members)


def begin_step(members: Iterable[StepShares]) -> None:
    """Forget the counts of the step before."""
    sums = []
    for member in members:
        member._pending.clear()
        member._has_counted = False
        if member._sums_E is not None:  # a replayed graph may have counted, unseen
            sums.append(member._sums_E)
    if sums:
        torch._foreach_zero_(sums)


@contextlib.contextmanager
def nothing_counted() -> Iterator[None]:
    """Restore the counts of all routers at the end of the scope, whose passes are only trials."""
    before = [
        (shares, list(shares._pending), shares._has_counted, None if shares._sums_E is None else shares._sums_E.clone())
        for shares in _step_shares.values()
    ]
    try:
        yield
    finally:
        for shares, pending, has_counted, sums_E in before:
            shares._pending[:], shares._has_counted = pending, has_counted
            if sums_E is not None and shares._sums_E is not None:
                shares._sums_E.copy_(sums_E)
            elif shares._sums_E is not None:
                shares._sums_E.zero_()


# Compilers see two opaque operators, whose order follows from their inputs.
_handles = itertools.count()
_step_shares: "weakref.WeakValueDictionary[int, StepShares]" = weakref.WeakValueDictionary()


def _count_for_step(counts_E: Tensor, handle: int) -> Tensor:
    counts_E = counts_E.clone()
    _step_shares[handle]._count(counts_E)
    return counts_E.clone()


torch.library.define("litgpt_moe_ext::count_for_step", "(Tensor counts_E, int handle) -> Tensor")
torch.library.impl("litgpt_moe_ext::count_for_step", "CompositeExplicitAutograd", _count_for_step)
torch.library.register_fake("litgpt_moe_ext::count_for_step", lambda counts_E, handle: torch.empty_like(counts_E))
torch.library.define("litgpt_moe_ext::shares_of_step", "(Tensor counts_E, int handle) -> Tensor")
torch.library.impl(
    "litgpt_moe_ext::shares_of_step",
    "CompositeExplicitAutograd",
    lambda counts_E, handle: _step_shares[handle]._shares(counts_E),
)
torch.library.register_fake(
    "litgpt_moe_ext::shares_of_step",
    lambda counts_E, handle: torch.empty_like(counts_E, dtype=counting_dtype(counts_E.device)),
)
