"""`litgpt-moe compare-runs`."""

from dataclasses import dataclass
from pathlib import Path

_TABLE = "Last values; tok/s is the median"
_CURVES = "Dots are validations. MaxVio is the largest load of an expert over the mean, minus 1, in the worst layer."
_LOAD = "Tokens of an expert in an optimizer step over what an even spread gives: 1 is even, red is more, blue less."


@dataclass(frozen=True)
class CompareRuns:
    """Draw training curves of runs in one plot, and heat maps of their expert load over steps, as a page and pictures.

    Attributes:
        run_dirs: The out_dir of each run: `compare-runs out/a out/b`.
        out_dir: Where report.html and its pictures go: curves.png, and load-NUMBER.png for each run in the order given.
    """

    run_dirs: list[Path]
    out_dir: Path = Path("out/compared-runs")

    def run(self) -> None:
        """Write the page and its pictures."""
        from litgpt_moe_ext.cli.output import print_table, write_bytes, write_text
        from litgpt_moe_ext.inspect.pages import page, picture, table
        from litgpt_moe_ext.inspect.runs.figures import curves_figure
        from litgpt_moe_ext.inspect.runs.logs import COLUMNS, distinct_names, last_values, load_run
        from litgpt_moe_ext.pictures.expert_load import load_over_steps_figure
        from litgpt_moe_ext.pictures.style import png

        names = distinct_names(self.run_dirs)
        logs = [load_run(directory, name) for name, directory in zip(names, self.run_dirs, strict=True)]
        pictures = {"curves": ("Curves", _CURVES, png(curves_figure(logs)))}
        for number, log in enumerate(logs):
            steps, layers = log.expert_load()
            if layers:
                figure = load_over_steps_figure(log.name, steps.tolist(), layers)
                pictures[f"load-{number}"] = (f"Experts of {log.name}", _LOAD, png(figure))
        for name, (_, _, image) in pictures.items():
            write_bytes(self.out_dir / f"{name}.png", image)
        for file in self.out_dir.glob("load-*.png"):  # those of an earlier call, with more runs
            if file.stem not in pictures and file.stem.removeprefix("load-").isdecimal():
                file.unlink()
        rows = [last_values(log) for log in logs]
        parts = [f"<p>{_TABLE}.</p>", table(COLUMNS, rows), *(picture(*content) for content in pictures.values())]
        write_text(self.out_dir / "report.html", page(f"Training of {', '.join(names)}", parts))
        print_table(_TABLE, COLUMNS, rows)
        print(f"Wrote {self.out_dir / 'report.html'}, and {', '.join(f'{name}.png' for name in pictures)} beside it")
