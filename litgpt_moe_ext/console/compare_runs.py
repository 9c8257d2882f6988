"""`litgpt-moe compare-runs`."""

from pathlib import Path


def compare_runs(run: list[Path], out_dir: Path = Path("compared-runs")) -> None:
    """Training curves of several runs as one plot, and heat maps of their expert load over time.

    Args:
        run: The out_dir of each run: `compare-runs out/a out/b`.
        out_dir: Where curves.png and load-NUMBER.png go, a number for each run in the order given.
    """
    if not run:
        raise ValueError("run: [] names no run; give the out_dir of at least one")
    from litgpt_moe_ext.analysis.run_figures import curves_figure, load_over_time_figure
    from litgpt_moe_ext.analysis.runs import RunLog, distinct_names, load_run
    from litgpt_moe_ext.console.output import print_table

    names = distinct_names(run)
    logs = [RunLog(name, load_run(directory).columns) for name, directory in zip(names, run, strict=True)]
    out_dir.mkdir(parents=True, exist_ok=True)
    written = [out_dir / "curves.png"]
    curves_figure(logs).savefig(written[0])
    for number, log in enumerate(logs):
        figure = load_over_time_figure(log)
        if figure is not None:
            written.append(out_dir / f"load-{number}.png")
            figure.savefig(written[-1])
    columns = ("run", "tokens", "loss", "val loss", "MaxVio", "grad norm", "tok/s")
    rows = []
    for log in logs:
        last = [log.series(name)[1] for name in ("total_tokens", "loss", "val_loss", "moe/max_vio", "grad_norm")]
        speed = log.tokens_per_second()[1]
        cells = [f"{values[-1]:{form}}" if len(values) else "-" for values, form in zip(last, _FORMS, strict=True)]
        rows.append((log.name, *cells, f"{sorted(speed)[len(speed) // 2]:,.0f}" if len(speed) else "-"))
    print_table("Last values; tok/s is the median", columns, rows)
    print("Wrote " + ", ".join(str(path) for path in written))


_FORMS = (",.0f", ".4f", ".4f", ".3f", ".3f")
