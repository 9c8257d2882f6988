"""Pictures of training runs."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from litgpt_moe_ext.inspect.runs.logs import RunLog
from litgpt_moe_ext.pictures.style import STYLE, begin_at_zero, dots_of, legend_below, line_of

_TITLES = ("Loss (dots: validation)", "Tokens per second", "MaxVio of the worst layer (0 is even)", "Gradient norm")


def curves_figure(runs: Sequence[RunLog]) -> Figure:
    """Draw loss, speed, MaxVio and gradient norm of runs over the tokens they had seen."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        panels = figure.subplots(2, 2)
        for axes, title in zip(panels.flat, _TITLES, strict=True):
            axes.set_title(title)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.25, linewidth=0.5)
        for i, run in enumerate(runs):
            # Similar runs overlap, so lower lines are wider.
            width = 1.1 + 0.9 * min(len(runs) - 1 - i, 2)
            for axes, (tokens, values) in zip(
                panels.flat,
                (run.series("loss"), run.tokens_per_second(), run.series("moe/max_vio"), run.series("grad_norm")),
                strict=True,
            ):
                axes.plot(tokens, values, linewidth=width, **line_of(i))
            panels[0, 0].plot(*run.series("val_loss"), markersize=3.5, **dots_of(i))
        begin_at_zero(panels[0, 1])
        panels[0, 1].yaxis.set_major_formatter(EngFormatter(sep=""))
        _mark_empty(panels.flat)
        legend_below(figure, [(run.name, line_of(i)) for i, run in enumerate(runs)])
    return figure


def _mark_empty(panels: Sequence[Axes]) -> None:
    for axes in panels:
        if not any(np.size(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="#777777")
