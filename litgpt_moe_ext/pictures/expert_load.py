"""The load of every expert over the steps of a run, from metrics to a heat map for each layer."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRIC = re.compile(r"moe_load_(\d+)/expert_(\d+)")
# With more columns than pixels, it would be arbitrary which of them are visible.
_MOST_COLUMNS = 400
_NAME = 60  # characters in the title

Value = TypeVar("Value")


def loads_by_layer(metrics: Mapping[str, Value]) -> dict[int, list[Value]]:
    """Return the values of the metrics `moe_load_LL/expert_EE`, by layer in the order of the experts."""
    found: dict[int, dict[int, Value]] = {}
    for name, value in metrics.items():
        if match := _METRIC.fullmatch(name):
            found.setdefault(int(match[1]), {})[int(match[2])] = value
    return {layer: [experts[e] for e in sorted(experts)] for layer, experts in sorted(found.items())}


def load_over_steps_figure(name: str, steps: Sequence[float], layers: Mapping[int, np.ndarray]) -> "Figure":
    """Draw heat maps of the load of every expert during training, one for each layer.

    Args:
        name: Name of the run, for the title.
        steps: Optimizer steps of the columns, ascending.
        layers: Load relative to an even share, by layer number, (experts, columns).
    """
    # Imported here, because training imports this module but draws in few runs.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from litgpt_moe_ext.pictures.style import STYLE, ratio_bar, ratio_image, shortened, title_above

    with matplotlib.rc_context(STYLE):
        n_expert = max(len(load) for load in layers.values())
        columns = 2 if len(layers) == 4 else min(len(layers), 3)
        rows = -(-len(layers) // columns)
        height = min(0.9 + 0.09 * n_expert, 3.0)
        figure = Figure(figsize=(2.6 * columns + 0.8, rows * height + 0.5), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns)).flatten()
        for unused in panels[len(layers) :]:
            unused.remove()
        half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
        for axes, (layer, load) in zip(panels, layers.items(), strict=False):
            extent = (steps[0] - half, steps[-1] + half, len(load) - 0.5, -0.5)
            ratio_image(axes, thinned(spread(steps, load, half), _MOST_COLUMNS), extent=extent)
            axes.set_title(f"layer {layer}")
            axes.set_xlabel("step")
            axes.set_ylabel("expert")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=4)
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=8)
        title_above(figure, f"Load of the experts of {shortened(name, _NAME)} over an even share")
        ratio_bar(figure)
    return figure


def spread(steps: Sequence[float], values: np.ndarray, margin: float) -> np.ndarray:
    """Return columns at even distances: unchanged, or the nearest columns if they are uneven.

    They are uneven if a run was resumed with another `train.log_interval`.

    Args:
        steps: Optimizer steps of the columns, ascending.
        values: Numbers, (rows, columns).
        margin: Steps before the first and after the last.
    """
    places = np.linspace(steps[0], steps[-1], len(steps))
    if np.abs(places - steps).max() <= (steps[-1] - steps[0]) / max(len(steps) - 1, 1):
        return values
    places = np.linspace(steps[0] - margin, steps[-1] + margin, _MOST_COLUMNS)
    middles = (np.asarray(steps[1:]) + steps[:-1]) / 2
    return values[:, np.searchsorted(middles, places)]


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Merge neighbouring columns into their means, so that at most `most` columns remain.

    Args:
        values: Numbers, (rows, columns).
        most: Number of columns, at least 1.
    """
    starts = np.linspace(0, values.shape[1], min(most, values.shape[1]), endpoint=False).astype(int)
    counts = np.diff([*starts, values.shape[1]])
    return np.add.reduceat(values, starts, axis=1) / counts
