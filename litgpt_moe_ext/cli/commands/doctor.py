"""`litgpt-moe doctor`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.cli.arguments import positional
from litgpt_moe_ext.errors import CANNOT, SettingsError
from litgpt_moe_ext.field_types import PositiveFloat
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from litgpt_moe_ext.inspect.recipes import Recipe

_MOST_MEMORY = 1_000_000
_WORDS = {"good": ("green", "ok"), "note": ("yellow", "note"), "problem": ("bold red", "PROBLEM")}


@dataclass(frozen=True)
class Doctor:
    """Describe this installation on one page, and say whether a recipe can run on it.

    Exits with status 1 at a problem, or if the recipe fits into no GPU of the memory given. A checkpoint that it
    resumes or starts from is checked too, except the numbers in its model file, which a run checks when it starts.

    Attributes:
        recipe: A recipe (YAML file), or a checkpoint directory. Without one only the installation is described.
        memory: GiB of memory of a GPU, to see which settings make the recipe fit there: `doctor RECIPE --memory 6`.
    """

    recipe: Path | None = positional(None)
    memory: PositiveFloat | None = None

    def run(self) -> int:
        """Print the page and return the exit status."""
        return self._print_page() if self.memory is None else self._search(self.memory)

    def _search(self, memory: float) -> int:
        from litgpt_moe_ext.inspect.recipes import load_recipe

        if memory > _MOST_MEMORY:
            raise SettingsError(f"memory: {memory:g} must be the GiB of a GPU, at most {_MOST_MEMORY}")
        if self.recipe is None:
            raise SettingsError(f"memory: {memory:g} needs a recipe; give doctor RECIPE --memory {memory:g}")
        return _print_fits(load_recipe(self.recipe), memory)

    def _print_page(self) -> int:
        from rich.console import Console
        from rich.markup import escape

        from litgpt_moe_ext.cli.settings import settings_of
        from litgpt_moe_ext.inspect.doctor.examination import examine
        from litgpt_moe_ext.inspect.recipes import load_recipe

        recipe, settings = None, None
        if self.recipe is not None:
            recipe = load_recipe(self.recipe)
            settings = None if recipe.checkpoint else settings_of([], self.recipe)
        findings = examine(recipe, settings)
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            style, word = _WORDS[finding.verdict]
            console.print(f"[{style}]{word:<8}[/] {finding.topic:<16} {escape(finding.text)}")
        problems = sum(finding.verdict == "problem" for finding in findings)
        if recipe is None:
            return CANNOT if problems else 0
        if problems:
            print(f"{self.recipe} cannot run here: {counted(problems, 'problem')}")
            return CANNOT
        print(f"{self.recipe} can run here")
        return 0


def _print_fits(recipe: "Recipe", gib: float) -> int:
    from litgpt_moe_ext.cli.output import print_table
    from litgpt_moe_ext.inspect.cost.fit import RUNTIME, best_fit, find_fits

    fits = find_fits(recipe, int(gib * 2**30))
    rows = [
        (
            fit.step.precision,
            fit.step.activation_checkpointing,
            "yes" if fit.step.fused_cross_entropy else "no",
            str(fit.micro_batch_size or "-"),
            f"{fit.bytes / 2**30:.2f}",
        )
        for fit in fits
    ]
    columns = ("precision", "activation checkpointing", "fused loss", "micro-batch", "GiB")
    print_table(f"Largest micro-batch on one GPU of {gib:g} GiB", columns, rows)
    reserve = f"{RUNTIME / 2**30:g} GiB are left to the runtime"
    if (best := best_fit(fits)) is None:
        print(f"Nothing fits ({reserve}): take a smaller model, or shard it over several GPUs with strategy: fsdp2")
        return CANNOT
    print(f"Try ({reserve}):")
    print(f"  {best.flags(recipe)}")
    return 0
