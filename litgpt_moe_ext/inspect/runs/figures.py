"""Pictures of training runs."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from litgpt_moe_ext.inspect.figures import STYLE, ratio_bar, ratio_image
from litgpt_moe_ext.inspect.runs.logs import RunLog

# More than a panel has pixels would leave to chance which of them are seen.
_MOST_COLUMNS = 400
_TITLES = ("Loss (dots: validation)", "Tokens per second", "MaxVio of the worst layer (0 is even)", "Gradient norm")


def curves_figure(runs: Sequence[RunLog]) -> Figure:
    """Loss, speed, MaxVio and gradient norm of several runs over the tokens they had seen."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        panels = figure.subplots(2, 2)
        for axes, title in zip(panels.flat, _TITLES, strict=True):
            axes.set_title(title)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.25, linewidth=0.5)
        for i, run in enumerate(runs):
            color = f"C{i % 10}"
            for axes, (tokens, values) in zip(
                panels.flat,
                (run.series("loss"), run.tokens_per_second(), run.series("moe/max_vio"), run.series("grad_norm")),
                strict=True,
            ):
                axes.plot(tokens, values, color=color, linewidth=1.1)
            panels[0, 0].plot(*run.series("val_loss"), "o", color=color, markersize=3.5)
        panels[0, 1].set_ylim(bottom=0)
        panels[0, 1].yaxis.set_major_formatter(EngFormatter(sep=""))
        _mark_empty(panels.flat)
        handles = [matplotlib.lines.Line2D([], [], color=f"C{i % 10}", label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4))
    return figure


def load_over_steps_figure(name: str, steps: Sequence[float], layers: Mapping[int, np.ndarray]) -> Figure:
    """Heat maps of the load of every expert while training, layer by layer.

    Args:
        name: Of the run.
        steps: Optimizer steps that the columns stand for, in rising order and at even distances.
        layers: By number of the layer, load over an even share, (experts, columns).
    """
    with matplotlib.rc_context(STYLE):
        n_expert = max(len(load) for load in layers.values())
        columns = min(len(layers), 3)
        rows = -(-len(layers) // columns)
        height = min(0.9 + 0.09 * n_expert, 3.0)
        figure = Figure(figsize=(2.6 * columns + 0.8, rows * height + 0.5), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns)).flatten()
        for unused in panels[len(layers) :]:
            unused.remove()
        half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
        for axes, (layer, load) in zip(panels, layers.items(), strict=False):
            extent = (steps[0] - half, steps[-1] + half, len(load) - 0.5, -0.5)
            image = ratio_image(axes, thinned(load, _MOST_COLUMNS), extent=extent)
            axes.set_title(f"layer {layer}")
            axes.set_xlabel("step")
            axes.set_ylabel("expert")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=4)
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=8)
        figure.suptitle(f"Load of the experts of {name} over an even share", fontsize=9)
        ratio_bar(figure, image)
    return figure


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Return the means of neighbouring columns, as few as it takes to have no more columns than `most`.

    Args:
        values: (rows, columns).
        most: At least 1.
    """
    starts = np.linspace(0, values.shape[1], min(most, values.shape[1]), endpoint=False).astype(int)
    counts = np.diff([*starts, values.shape[1]])
    return np.add.reduceat(values, starts, axis=1) / counts


def _mark_empty(panels: Sequence[Axes]) -> None:
    for axes in panels:
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="#777777")
