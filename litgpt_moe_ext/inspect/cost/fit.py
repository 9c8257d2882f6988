"""Finds settings that make a recipe fit into a GPU's memory."""

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
"""Bytes taken by CUDA's context and library workspaces besides the tensors."""


@dataclass(frozen=True)
class Fit:
    """How large a micro-batch of a recipe fits with given settings.

    Attributes:
        step: The settings, with the recipe's micro-batch.
        micro_batch_size: The largest micro-batch that fits and divides the global batch; 0 if none does.
        bytes: Memory of a step with this micro-batch, or with 1 if none fits.
    """

    step: Step
    micro_batch_size: int
    bytes: int

    def flags(self, recipe: "Recipe") -> str:
        """Return the flags of `run_train.py` that change a recipe to these settings."""
        own = recipe.step(self.step.precision)
        flags = [f"--precision {self.step.precision}", f"--train.micro_batch_size {self.micro_batch_size}"]
        if self.step.activation_checkpointing != own.activation_checkpointing:
            flags.append(f"--activation_checkpointing {self.step.activation_checkpointing}")
        if self.step.fused_cross_entropy != own.fused_cross_entropy:
            flags.append(f"--fused_cross_entropy {str(self.step.fused_cross_entropy).lower()}")
        return " ".join(flags)


def find_fits(recipe: "Recipe", memory: int) -> list[Fit]:
    """Return what fits on one GPU for every combination of settings, the fastest first.

    Args:
        recipe: The recipe.
        memory: Memory of the GPU in bytes.
    """
    room, short = memory - RUNTIME, shorten(recipe.config)
    return [_fit(recipe, short, step, room) for step in _steps(recipe)]


def best_fit(fits: list[Fit]) -> Fit | None:
    """Return the fastest settings among those that fit; None if nothing does.

    Settings without recomputation come first, then those with the largest micro-batch.
    """
    fitting = [fit for fit in fits if fit.micro_batch_size]
    wanted = [fit for fit in fitting if fit.micro_batch_size >= fit.step.micro_batch_size]
    return wanted[0] if wanted else max(fitting, key=lambda fit: fit.micro_batch_size, default=None)


def _steps(recipe: "Recipe") -> Iterator[Step]:
    # A GPU may support only the recipe's precision. Of the others, mixed precision is the fastest, and pure bfloat16
    # trains less exactly.
    own = recipe.settings.precision
    for precision in dict.fromkeys((*([own] if own in PRECISIONS else []), "bf16-mixed", "bf16-true")):
        # On Linux, torch includes Triton; on Windows without Triton, a GPU makes copies of the logits.
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
    # Activations grow with every sequence, by at least as much as from 1 to 2: at most this many fit.
    most = 1 + (room - one.total) // max(memory(2).activations - one.activations, 1)
    batch = recipe.settings.train.global_batch_size
    for size in (n for n in range(min(most, batch), 1, -1) if batch % n == 0):
        if (total := memory(size).total) <= room:
            return Fit(step, size, total)
    return Fit(step, 1, one.total)
