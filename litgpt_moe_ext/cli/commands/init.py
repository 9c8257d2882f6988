"""`litgpt-moe init`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt_moe_ext.cli.arguments import positional
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import in_shell, quoted


@dataclass(frozen=True)
class Init:
    """Write one of the packaged recipes, to be trained or changed; without a name, list them.

    Attributes:
        recipe: Name of a recipe, for example quickstart.
        out: File to write, which must not exist. Default: the recipe's name in the working directory.
    """

    recipe: str | None = positional(None)
    out: Path | None = positional(None)

    def run(self) -> None:
        """Write the recipe, or list all."""
        from litgpt_moe_ext.cli.output import write_text
        from litgpt_moe_ext.cli.paths import check_path
        from litgpt_moe_ext.cli.recipes import recipe_names, recipe_summary, recipe_text

        names = recipe_names()
        if self.recipe is None:
            width = max(map(len, names))
            for name in names:
                print(f"{name:<{width}}  {recipe_summary(name)}")
            return
        name = self.recipe.removesuffix(".yaml")
        if name not in names:
            raise SettingsError(f"recipe: {self.recipe} must be one of {', '.join(names)}")
        out = self.out or Path(f"{name}.yaml")
        check_path("out", out)
        if out.exists():
            raise SettingsError(f"out: {quoted(out)} exists; name a new file")
        write_text(out, recipe_text(name))
        file = in_shell(out)
        print(f"Wrote {out}; `litgpt-moe doctor {file}` says whether it can run here, and")
        print(f"  litgpt-moe train --config {file}")
        print("trains it")
