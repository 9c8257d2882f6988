"""The memory of a training step: predicted by `litgpt-moe doctor`, and measured."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from litgpt import Config

from gpu_tables.contenders.recipes import Recipe, recipes
from gpu_tables.contenders.training import Trainee
from gpu_tables.measuring.bench import Bench
from litgpt_moe_ext.inspect.cost.layers import shorten
from litgpt_moe_ext.inspect.cost.memory import Step, training_memory
from litgpt_moe_ext.kernels.launch import triton_works_on


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    kernel_loss = bench.is_cuda and triton_works_on(bench.device)
    for recipe in recipes(bench.tiny):
        step = Step("bf16-mixed", recipe.micro_batch, recipe.length, kernel_loss=kernel_loss)
        predicted = training_memory(shorten(Config(**recipe.settings)), step).total / 2**30
        measured = _measured_gib(recipe, bench) if bench.is_cuda else None
        yield {
            "recipe": recipe.name, "batch": recipe.micro_batch, "predicted GiB": predicted, "measured GiB": measured
        }  # fmt: skip


def _measured_gib(recipe: Recipe, bench: Bench) -> float | None:
    """Return the peak memory of two steps; None if memory does not suffice."""
    torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(torch.OutOfMemoryError):
        trainee = Trainee(recipe.settings, bench, recipe.batches(bench.device, accumulation=1))
        trainee.step()
        trainee.step()
        return torch.cuda.max_memory_allocated() / 2**30
    return None
