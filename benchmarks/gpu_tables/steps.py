"""Whole training steps of recipes against those of their dense twins."""

from collections.abc import Iterator
from typing import Any

import torch

from gpu_tables.contenders.recipes import RECIPES, RECOMPUTED, Recipe, contenders, recipes
from gpu_tables.contenders.training import Trainee
from gpu_tables.measuring.bench import Bench, described, ratio
from litgpt_moe_ext.model_size import count_flops
from litgpt_moe_ext.training.gpu_peaks import peak_flops


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    graphs = ("unshared", "one stream", "passes only")
    apart = tuple(f"ours, graphs, {without}" for without in graphs)
    return _measured(bench, ("dense twin, graphs", "ours, graphs", *apart, "dense twin", "ours", "LLaMAMoE"))


def compiled_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    return _measured(bench, () if bench.tiny else ("dense twin, compiled", "ours, compiled"))


def recomputed_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    names = ("dense twin, graphs, recomputed", "ours, graphs, recomputed", "dense twin, recomputed", "ours, recomputed")
    return _measured(bench, names, RECOMPUTED)


def _measured(bench: Bench, names: tuple[str, ...], of: tuple[str, ...] = RECIPES) -> Iterator[dict[str, Any]]:
    """Measure models of these `names`, each dense twin before its rivals."""
    for recipe in recipes(bench.tiny, of):
        twin: dict[str, Any] = {}
        for name in names:
            if bench.budget.is_spent:
                return
            # Memory kept by the last model must not count for this one.
            bench.free_memory()
            try:
                figures = _step_figures(bench, recipe, name)
            except Exception as error:
                bench.note(f"{recipe.name}, {name} is left out: {described(error)}")
                continue
            if name.startswith("dense twin"):
                twin = figures
            yield {
                "recipe": recipe.name,
                "batch": f"{recipe.accumulation} x {recipe.micro_batch} x {recipe.length}",
                "model": name,
                "ms per step": figures["ms"],
                "time / dense twin": ratio(figures["ms"], twin.get("ms")),
                "device, ms": figures["device ms"],
                "device / dense twin": ratio(figures["device ms"], twin.get("device ms")),
                **{column: figures[column] for column in ("tokens per second", "MFU", "TFLOP/s", "peak GiB", "waits")},
            }


def _step_figures(bench: Bench, recipe: Recipe, name: str) -> dict[str, Any]:
    """Train a model of a recipe; the milliseconds are None if its step fails, and so is what follows from them."""
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    model, _, how = name.partition(", ")
    trainee = Trainee(contenders(recipe.settings)[model], bench, recipe.batches(bench.device), how or "eager")
    call = {f"{recipe.name}, {name}": trainee.step}
    (time_ms,) = bench.medians(call).values()
    device_ms = None
    if time_ms and how.startswith("graphs"):
        # The step of a small model takes longer on the host than on the device.
        (device_ms,) = bench.medians(call, ahead=True).values()
    n_row = recipe.accumulation * recipe.micro_batch
    flops = n_row * count_flops(trainee.config, recipe.length, training=True)
    precision = "16-mixed" if bench.dtype == torch.float16 else "bf16-mixed"
    peak = peak_flops(torch.cuda.get_device_name(), precision, "ieee") if bench.is_cuda else None
    return {
        "ms": time_ms,
        "device ms": device_ms,
        "tokens per second": n_row * recipe.length / time_ms * 1e3 if time_ms else None,
        "MFU": flops / time_ms * 1e3 / peak if time_ms and peak else None,
        "TFLOP/s": flops / time_ms * 1e-9 if time_ms else None,
        "peak GiB": torch.cuda.max_memory_reserved() / 2**30 if bench.is_cuda else None,
        "waits": _waits(trainee, bench) if time_ms else None,
    }


def _waits(trainee: Trainee, bench: Bench) -> str:
    """Return whether the host waits for the device in a step."""
    if not bench.is_cuda:
        return "-"
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainee.step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return "yes"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"
