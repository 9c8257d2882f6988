"""`litgpt-moe schedule`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt_moe_ext.training.settings import ScheduleName
from litgpt_moe_ext.wording import counted


@dataclass(frozen=True)
class Schedule:
    """Plot the learning rate of a recipe over the steps of its training.

    Attributes:
        recipe: A recipe (YAML file), or a checkpoint directory with the hyperparameters of its training.
        compare: Shapes to draw as well: `--compare cosine wsd`.
        out: File of the picture.
    """

    recipe: Path
    compare: list[ScheduleName] | None = None
    out: Path = Path("out/schedule.png")

    def run(self) -> None:
        """Draw the picture and print its corners."""
        from litgpt_moe_ext.cli.output import print_table, write_bytes
        from litgpt_moe_ext.cli.settings import read_plain_settings
        from litgpt_moe_ext.inspect.runs.schedule import planned_rates, schedule_figure
        from litgpt_moe_ext.pictures.style import png

        settings = read_plain_settings(self.recipe)
        own = settings.schedule.name
        rates: dict[str, list[float]] = {
            name: planned_rates(settings, name) for name in dict.fromkeys([own, *(self.compare or [])])
        }
        write_bytes(self.out, png(schedule_figure(rates)))
        rows = [
            (
                f"{name} (the recipe's)" if name == own else name,
                *(f"{rate:.3e}" for rate in (values[0], max(values), values[len(values) // 2], values[-1])),
            )
            for name, values in rates.items()
        ]
        columns = ("schedule", "first", "highest", "half-way", "last")
        print_table(f"Learning rates of {self.recipe}, {counted(len(rates[own]), 'step')}", columns, rows)
        print(f"Wrote {self.out}")
