"""`litgpt-moe schedule`."""

from pathlib import Path
from typing import Any, Literal


def schedule(
    recipe: Path,
    compare: list[Literal["cosine", "onecycle", "wsd", "linear", "constant", "inverse_sqrt"]] | None = None,
    out: Path = Path("schedule.png"),
) -> None:
    """Plot the learning rate of a recipe over the steps of its training.

    Args:
        recipe: A YAML file for run_train.py, or the hyperparameters.yaml of a checkpoint.
        compare: Shapes to draw as well: `--compare cosine wsd`.
        out: The picture.
    """
    import litgpt_moe_ext
    from litgpt_moe_ext.cli.recipe_files import check_recipe

    check_recipe(recipe)
    litgpt_moe_ext.register()
    from litgpt_moe_ext.cli.commands.output import print_table
    from litgpt_moe_ext.cli.train import build_parser
    from litgpt_moe_ext.inspect.runs.schedule import planned_rates, schedule_figure
    from litgpt_moe_ext.pictures.style import png

    parser = build_parser()
    settings: Any = parser.instantiate_classes(parser.parse_args(["--config", str(recipe)]))
    own = settings.schedule.name
    rates = {name: planned_rates(settings, name) for name in dict.fromkeys([own, *(compare or [])])}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(png(schedule_figure(rates)))
    rows = [
        (
            f"{name} (the recipe's)" if name == own else name,
            *(f"{rate:.3e}" for rate in (values[0], max(values), values[len(values) // 2], values[-1])),
        )
        for name, values in rates.items()
    ]
    columns = ("schedule", "first", "highest", "half-way", "last")
    print_table(f"Learning rates of {recipe}, {len(rates[own]):,} steps", columns, rows)
    print(f"Wrote {out}")
