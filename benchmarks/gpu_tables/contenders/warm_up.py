"""Triton's kernels of all layers and recipes, compiled before any is measured."""

import contextlib
import multiprocessing
import os

import torch

from gpu_tables.contenders.layers import SIZES, Size, forward_backward, make_layer
from gpu_tables.contenders.recipes import RECIPES, load
from gpu_tables.contenders.training import Trainee
from gpu_tables.measuring.bench import Bench


def warm_up() -> None:
    """Compile on all cores; one kernel after the other would take most of the time there is."""
    jobs = (*SIZES, *RECIPES)
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        for job in [pool.apply_async(_compile_kernels, (job,)) for job in jobs]:
            # Whatever fails here fails again, and is reported, where it is measured.
            with contextlib.suppress(Exception):
                job.get(timeout=90)


def _compile_kernels(job: Size | str) -> None:
    """Compile what a layer or the step of a recipe needs, for the cache on the disk that other processes read."""
    bench = Bench("cuda", tiny=False, minutes=1.0)
    if isinstance(job, Size):
        for T in (8, 2048, 16384):
            x = torch.randn(1, T, job.D, device=bench.device, dtype=bench.dtype).requires_grad_()
            layer = make_layer(job, bench, "triton")
            forward_backward(layer, x)
            with torch.no_grad():
                layer(x)
    else:
        recipe = load(job, tiny=False)
        Trainee(recipe.settings, bench, recipe.batches(bench.device, accumulation=1)).step()
    torch.cuda.synchronize()
