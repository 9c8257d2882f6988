"""`litgpt-moe compare-runs`."""

from pathlib import Path


def compare_runs(run: list[Path], out_dir: Path = Path("compared-runs")) -> None:
    """Training curves of runs in one plot, and heat maps of their expert load over steps, as a page and pictures.

    Args:
        run: The out_dir of each run: `compare-runs out/a out/b`.
        out_dir: Where report.html and its pictures go: curves.png, and load-NUMBER.png for each run in the order given.
    """
    if not run:
        raise ValueError("run: [] names no run; give the out_dir of at least one")
    from litgpt_moe_ext.cli.commands.output import print_table, write_text
    from litgpt_moe_ext.inspect.pages import page, picture, table
    from litgpt_moe_ext.inspect.runs.figures import curves_figure
    from litgpt_moe_ext.inspect.runs.logs import RunLog, distinct_names, load_run
    from litgpt_moe_ext.pictures.expert_load import load_over_steps_figure
    from litgpt_moe_ext.pictures.style import png

    names = distinct_names(run)
    logs = [RunLog(name, load_run(directory).columns) for name, directory in zip(names, run, strict=True)]
    pictures = {"curves": ("Curves", _CURVES, curves_figure(logs))}
    for number, log in enumerate(logs):
        steps, layers = log.expert_load()
        if layers:
            figure = load_over_steps_figure(log.name, steps, layers)
            pictures[f"load-{number}"] = (f"Experts of {log.name}", _LOAD, figure)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, (_, _, figure) in pictures.items():
        (out_dir / f"{name}.png").write_bytes(png(figure))
    columns = ("run", "tokens", "loss", "val loss", "MaxVio", "grad norm", "tok/s")
    rows = []
    for log in logs:
        last = [log.series(name)[1] for name in ("total_tokens", "loss", "val_loss", "moe/max_vio", "grad_norm")]
        speed = log.tokens_per_second()[1]
        cells = [f"{values[-1]:{form}}" if len(values) else "-" for values, form in zip(last, _FORMS, strict=True)]
        rows.append((log.name, *cells, f"{sorted(speed)[len(speed) // 2]:,.0f}" if len(speed) else "-"))
    parts = [f"<p>{_TABLE}.</p>", table(columns, rows), *(picture(*content) for content in pictures.values())]
    write_text(out_dir / "report.html", page(f"Training of {', '.join(names)}", parts))
    print_table(_TABLE, columns, rows)
    print(f"Wrote {out_dir / 'report.html'}, and {', '.join(f'{name}.png' for name in pictures)} beside it")


_TABLE = "Last values; tok/s is the median"
_CURVES = "Dots are validations. MaxVio is the largest load of an expert over the mean, minus 1, in the worst layer."
_LOAD = "Tokens of an expert in an optimizer step over what an even spread gives: 1 is even, red is more, blue less."
_FORMS = (",.0f", ".4f", ".4f", ".3f", ".3f")
