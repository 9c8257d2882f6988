"""Which settings make a recipe fit into the memory of a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from litgpt_moe_ext.inspect.cost.layers import ShortModel, shorten
from litgpt_moe_ext.inspect.cost.memory import PRECISIONS, Step, TrainingMemory, fusing_choices, training_memory
from litgpt_moe_ext.kernels.launch import triton_installed
from litgpt_moe_ext.training.callbacks.activation_checkpointing import Mode

if TYPE_CHECKING:
    from litgpt_moe_ext.inspect.recipes import Recipe

RUNTIME = 3 * 2**28
"""Bytes that CUDA's context and the workspaces of libraries take beside the tensors."""


@dataclass(frozen=True)
class Fit:
    """How much of a recipe fits with some settings.

    Attributes:
        step: The settings, with the recipe's micro-batch.
        micro_batch_size: The largest micro-batch that fits and divides the global batch; 0 if none does.
        bytes: What the step with this micro-batch takes, or with 1 if none fits.
    """

    step: Step
    micro_batch_size: int
    bytes: int

    def flags(self, recipe: "Recipe") -> str:
        """Return what changes a recipe to these settings, as flags of `run_train.py`."""
        own = recipe.step(self.step.precision)
        flags = [f"--precision {self.step.precision}", f"--train.micro_batch_size {self.micro_batch_size}"]
        if self.step.activation_checkpointing != own.activation_checkpointing:
            flags.append(f"--activation_checkpointing {self.step.activation_checkpointing}")
        if self.step.fused_cross_entropy != own.fused_cross_entropy:
            flags.append(f"--fused_cross_entropy {str(self.step.fused_cross_entropy).lower()}")
        return " ".join(flags)


def find_fits(recipe: "Recipe", memory: int) -> list[Fit]:
    """Return what fits into the memory of one GPU, for every combination of settings, the fastest first.

    Args:
        recipe: The recipe.
        memory: Bytes of the GPU.
    """
    room, short = memory - RUNTIME, shorten(recipe.config)
    return [_fit(recipe, short, step, room) for step in _steps(recipe)]


def best_fit(fits: list[Fit]) -> Fit | None:
    """Return the fastest settings among those that fit; None if nothing does.

    Whatever computes nothing again comes first; then the largest micro-batch.
    """
    fitting = [fit for fit in fits if fit.micro_batch_size]
    wanted = [fit for fit in fitting if fit.micro_batch_size >= fit.step.micro_batch_size]
    return wanted[0] if wanted else max(fitting, key=lambda fit: fit.micro_batch_size, default=None)


def _steps(recipe: "Recipe") -> Iterator[Step]:
    # The recipe's may be the only one that a GPU has. Otherwise mixed precision is the fastest, and all of bfloat16
    # trains less exactly.
    own = [recipe.precision] if recipe.precision in PRECISIONS else []
    precisions = dict.fromkeys((*own, "bf16-mixed", "bf16-true"))
    for precision in precisions:
        # Linux brings Triton along; a GPU in a Windows machine without it makes copies of the logits.
        step = replace(recipe.step(precision), kernel_loss=triton_installed())
        for mode in get_args(Mode):
            for fuses in fusing_choices(recipe.config):
                yield replace(step, activation_checkpointing=mode, fused_cross_entropy=fuses)


def _fit(recipe: "Recipe", short: ShortModel, step: Step, room: int) -> Fit:
    def memory(micro_batch_size: int) -> TrainingMemory:
        return training_memory(short, replace(step, micro_batch_size=micro_batch_size))

    one = memory(1)
    if one.total > room:
        return Fit(step, 0, one.total)
    # The activations grow with every sequence, and by no less the more there are: what fits is at most this.
    most = 1 + (room - one.total) // max(memory(2).activations - one.activations, 1)
    batch = recipe.global_batch_size
    for size in (n for n in range(min(most, batch), 1, -1) if batch % n == 0):
        if (total := memory(size).total) <= room:
            return Fit(step, size, total)
    return Fit(step, 1, one.total)
