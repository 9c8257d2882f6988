"""A batch of a validation, with the graphs of the training that it interrupts and without."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from gpu_tables.contenders.recipes import Recipe, contenders, recipes
from gpu_tables.contenders.training import Trainee
from gpu_tables.measuring.bench import Bench, described, ratio


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for recipe in recipes(bench.tiny):
        if bench.budget.is_spent:
            return
        bench.free_memory()
        try:
            times = _times(bench, recipe)
        except Exception as error:
            bench.note(f"{recipe.name} is left out: {described(error)}")
            continue
        plain, graph = times["no graph"], times.get("graph")
        yield {
            "recipe": recipe.name,
            "batch": f"{recipe.micro_batch} x {recipe.length}",
            "ms": plain,
            "ms, graph": graph,
            "graph / none": ratio(graph, plain),
        }


def _times(bench: Bench, recipe: Recipe) -> dict[str, float | None]:
    trainee = Trainee(contenders(recipe.settings)["ours"], bench, recipe.batches(bench.device, 1), "graphs")
    trainee.model.eval()
    calls = {"no graph": partial(trainee.validate, trainee.plain_loss)}
    if trainee.validated is not None:
        calls["graph"] = partial(trainee.validate, trainee.validated)
    return bench.medians(calls)
