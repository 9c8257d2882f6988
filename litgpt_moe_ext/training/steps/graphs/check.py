"""Checks that replayed passes compute the same as passes without graphs.

A run checks this with its first captured micro-batch, because a fault in the driver, in torch or in this package would
otherwise silently train on wrong numbers. The check costs three more passes, a few replays and waits. It compares the
norms of gradients, because there may be no room for a second copy of the gradients themselves. Captured validations are
checked as well.

Shape legend: B batch, T tokens, N numbers: the loss, and the norm of each leaf's gradient.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from litgpt_moe_ext.moe.balancing.step_shares import nothing_counted
from litgpt_moe_ext.training.steps.graphs.capture import Loss, Passes, leaves_of
from litgpt_moe_ext.training.steps.graphs.obstacles import GraphError

# Tolerances relative to each number and to the norm of the whole gradient. Sums in another order differ by less than a
# tenth of them; a gradient that is missing, counted twice, or computed from the wrong memory differs by far more.
_PART, _PART_OF_WHOLE = 0.01, 0.001


class Reference:
    """A micro-batch's loss and gradient norms computed without graphs and without side effects.

    Args:
        loss: The loss function.
        ids_BT: Token ids, int64.
        targets_BT: Targets, int64.

    Attributes:
        leaves: The leaves that receive gradients.
    """

    def __init__(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> None:
        with side_effects_undone(ids_BT.device):
            value = loss(ids_BT, targets_BT)
            self.leaves = leaves_of(value)
            gradients = torch.autograd.grad(value, self.leaves, allow_unused=True)
        self._numbers_N = _numbers(value, gradients)

    def compare(self, passes: Passes, times: int, model: nn.Module) -> None:
        """Replay passes and compare.

        Args:
            passes: Passes over the same micro-batch. They leave their gradients in `passes.gradients`.
            times: How many times the micro-batch's gradients have been added up after the replay.
            model: The model, to name a parameter in an error.

        Raises:
            GraphError: If the replay computes something else.
        """
        with side_effects_undone(passes.loss.device):
            passes.forward()
            passes.scale.fill_(1)
            passes.backward()
        found_N = _numbers(passes.loss, [passes.gradients.get(leaf) for leaf in self.leaves])
        expected_N = torch.cat([self._numbers_N[:1], times * self._numbers_N[1:]])
        if not expected_N.isfinite().all():
            return  # not comparable
        learns_N = [False, *(isinstance(leaf, nn.Parameter) for leaf in self.leaves)]
        whole = expected_N[torch.tensor(learns_N)].norm()
        is_close_N = (found_N - expected_N).abs() <= _PART * expected_N.abs() + _PART_OF_WHOLE * whole
        if is_close_N.all():
            return
        index = int(is_close_N.int().argmin())
        found, expected = found_N[index].item(), expected_N[index].item()
        what = "the loss is" if index == 0 else f"the gradient of {_name(self.leaves[index - 1], model)} has the norm"
        raise GraphError(f"replayed, {what} {found:.5g}, and without graphs {expected:.5g}")


def require_same_loss(found: Tensor, expected: Tensor) -> None:
    """Compare a replayed loss without gradients with the loss itself, both scalars; wait for the device.

    Raises:
        GraphError: If they differ.
    """
    found_N, expected_N = _numbers(found, []), _numbers(expected, [])
    if (found_N - expected_N).abs() > _PART * expected_N.abs() + _PART_OF_WHOLE:  # a loss of 0 can differ, too
        raise GraphError(f"replayed, the loss is {found_N.item():.5g}, and without graphs {expected_N.item():.5g}")


def _name(leaf: Tensor, model: nn.Module) -> str:
    names = (name for name, parameter in model.named_parameters() if parameter is leaf)
    return next(names, "a router's counts").removeprefix("_forward_module.")


def _numbers(loss: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    # The loss and the gradient norms, (N,), float64, on the CPU.
    zero = loss.new_zeros((), dtype=torch.float32)
    norms = [
        zero if gradient is None else gradient.norm(dtype=torch.promote_types(gradient.dtype, torch.float32)).float()
        for gradient in gradients
    ]
    return torch.stack([loss.detach().float(), *norms]).cpu().double()


@contextlib.contextmanager
def side_effects_undone(device: torch.device) -> Iterator[None]:
    """At the end of the scope, undo what passes change besides gradients: random generators and the counts of a step.

    Args:
        device: The device whose random generator is restored, besides the CPU's.
    """
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []), nothing_counted():
        yield
