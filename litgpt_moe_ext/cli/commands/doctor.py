"""`litgpt-moe doctor`."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveFloat

from litgpt_moe_ext.cli.arguments import positional
from litgpt_moe_ext.cli.errors import CANNOT

_WORDS = {"good": ("green", "ok"), "note": ("yellow", "note"), "problem": ("bold red", "PROBLEM")}


@dataclass(frozen=True)
class Doctor:
    """Describe this installation on one page, and say whether a recipe can run on it.

    Exits with status 1 if the recipe cannot run here.

    Attributes:
        recipe: A recipe (YAML file), or a checkpoint directory. Without one only the installation is described.
        memory: GiB of memory of a GPU, to see which settings make the recipe fit there: `doctor RECIPE --memory 6`.
    """

    recipe: Path | None = positional(None)
    memory: PositiveFloat | None = None

    def run(self) -> int:
        """Print the page and return the exit status."""
        from rich.console import Console
        from rich.markup import escape

        from litgpt_moe_ext.inspect.cost.doctor import examine
        from litgpt_moe_ext.inspect.recipes import load_recipe

        recipe = None if self.recipe is None else load_recipe(self.recipe)
        findings = examine(recipe)
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            style, word = _WORDS[finding.verdict]
            console.print(f"[{style}]{word:<8}[/] {finding.topic:<16} {escape(finding.text)}")
        if recipe is None:
            return 0
        if problems := sum(finding.verdict == "problem" for finding in findings):
            print(f"{self.recipe} cannot run here: {problems} problem{'s' * (problems > 1)}")
            return CANNOT
        print(f"{self.recipe} can run here")
        return 0
