"""Pictures of experts and of runs, sized and labelled for a paper.

Each function returns a matplotlib figure; nothing here opens a window. Values above or below an even share have a
diverging colour scale around it, in base-2 logarithms of ratios.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from litgpt_moe_ext.pictures.style import (
    FONT_SIZE,
    LARGEST_LOG2,
    STYLE,
    begin_at_zero,
    clipped_log2,
    color_bar,
    ratio_bar,
    ratio_image,
    shortened,
    whole_numbers,
)

# Columns of panels, and the largest number of cells in which numbers are legible.
_COLUMNS = 4
_WRITABLE = 16
# Characters of a checkpoint's name beside an axis.
_NAME = 16
# In inches.
_SMALLEST_PANEL, _LARGEST_PANEL = 1.6, 4.0


def load_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw heat maps of load and gate mass, experts by layers; 1 is an even share."""
    load = [layer["load_over_mean"] for layer in layers]
    mass = [[share * layer["n_expert"] for share in layer["gate_mass"]] for layer in layers]
    with matplotlib.rc_context(STYLE):
        n_expert = len(load[0])
        width = min(2.0 + 0.34 * n_expert, 6.5)
        figure = Figure(figsize=(2 * width, 1.1 + 0.32 * len(layers)), layout="constrained")
        for axes, values, title in zip(figure.subplots(1, 2), (load, mass), ("Load", "Gate mass"), strict=True):
            _ratios(axes, np.array(values, dtype=float))
            axes.set_title(f"{title} over an even share")
            _expert_ticks(axes, n_expert)
            axes.set_yticks(range(len(layers)), [layer["layer"] for layer in layers])
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
        ratio_bar(figure)
    return figure


def balance_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw balance, certainty and specialisation by layer."""
    numbers = [layer["layer"] for layer in layers]
    panels = {
        "MaxVio\n0 is even": [layer["max_vio"] for layer in layers],
        "Entropy of the load\n1 is even": [layer["load_entropy"] for layer in layers],
        "Router entropy / ln E\n0 is certain": [
            # A single expert has no entropy to compare with.
            layer["router_entropy"] / layer["router_entropy_of_even"]
            if layer["router_entropy"] is not None and layer["n_expert"] > 1
            else math.nan
            for layer in layers
        ],
        "Information about the class\n1 is specialists": [
            math.nan if layer["class_information"] is None else layer["class_information"] for layer in layers
        ],
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            axes.plot(numbers, values, marker="o", markersize=3.5, color="#30638e")
            axes.set_title(title)
            axes.set_xlabel("layer")
            if title.startswith(("MaxVio", "Information")):
                begin_at_zero(axes)
            else:
                axes.set_ylim(0, 1.05)
            whole_numbers(axes)
    return figure


def class_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw heat maps of token class by expert: how much more likely tokens of a class choose an expert."""
    names = list(layers[0]["class_lift"])
    n_expert = layers[0]["n_expert"]
    with matplotlib.rc_context(STYLE):
        size = (_side(n_expert), 0.5 + 0.16 * len(names))
        figure, panels = _panels(len(layers), size, left=0.9)
        for i, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
            _ratios(axes, _array(list(layer["class_lift"].values())), write=False)
            axes.set_title(f"layer {layer['layer']}")
            _expert_ticks(axes, n_expert)
            axes.set_yticks(range(len(names)), names if i % _COLUMNS == 0 else [""] * len(names))
            axes.set_xlabel("expert")
        ratio_bar(figure, "p(expert | class) / p(expert)")
    return figure


def coactivation_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw heat maps of pairs of experts: how much more often a token visits both than their loads alone explain."""
    n_expert = layers[0]["n_expert"]
    with matplotlib.rc_context(STYLE):
        side = _side(n_expert)
        figure, panels = _panels(len(layers), (side, side))
        for axes, layer in zip(panels, layers, strict=True):
            _ratios(axes, _array(layer["coactivation_lift"]), write=False)
            axes.set_title(f"layer {layer['layer']}")
            _expert_ticks(axes, n_expert)
            axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()])
            axes.set_xlabel("expert")
        panels[0].set_ylabel("expert")
        ratio_bar(figure, "pairs over expectation")
    return figure


def agreement_figure(comparison: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> Figure:
    """Draw the agreement of two checkpoints by layer, and which of their experts correspond."""
    layers = [entry["layer"] for entry in comparison]
    n_expert = len(comparison[0]["matching"])
    shares = []
    for entry in comparison:
        overlap = np.array(entry["overlap_EE"], dtype=float)[:, entry["matching"]]
        shares.append(overlap / np.maximum(overlap.sum(axis=1, keepdims=True), 1))
    with matplotlib.rc_context(STYLE):
        side = max(2.2, _side(n_expert))
        figure, panels = _panels(1 + len(comparison), (side, side), left=0.6)
        first = panels[0]
        for key, label, style in (
            ("matched", "matched", "o-"),
            ("same", "same number", "s--"),
            ("chance", "chance", ":"),
        ):
            first.plot(layers, [entry[key] for entry in comparison], style, markersize=3.5, label=label)
        first.set_ylim(0, 1.05)  # full agreement is no line on the frame
        first.set_title("experts in common")
        first.set_xlabel("layer")
        whole_numbers(first)
        first.legend(loc="best")
        shades: dict[str, Any] = {"norm": Normalize(0, max(share.max() for share in shares)), "cmap": "Blues"}
        for i, (axes, entry, share) in enumerate(zip(panels[1:], comparison, shares, strict=True), start=1):
            axes.imshow(share, interpolation="nearest", **shades)
            axes.set_title(f"layer {entry['layer']}")
            ticks = _tick_places(n_expert)
            axes.set_xticks(ticks, [entry["matching"][i] for i in ticks])
            axes.set_yticks(ticks)
            axes.set_xlabel(f"expert of {shortened(names[1], _NAME)}")
            if i == 1 or i % _COLUMNS == 0:
                axes.set_ylabel(f"expert of {shortened(names[0], _NAME)}")
        color_bar(figure, ScalarMappable(**shades), panels[1:], "share of the row")
    return figure


def _side(n_expert: int) -> float:
    return min(max(0.6 + 0.17 * n_expert, _SMALLEST_PANEL), _LARGEST_PANEL)


def _panels(count: int, size: tuple[float, float], left: float = 0.3) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    width, height = size
    figure = Figure(figsize=(columns * width + left + 0.8, rows * (height + 0.35)), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flatten())
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _ratios(axes: Axes, values: np.ndarray, write: bool = True) -> None:
    if write and values.shape[1] <= _WRITABLE:
        for (row, column), log in np.ndenumerate(clipped_log2(values)):
            color = "white" if abs(log) > 0.7 * LARGEST_LOG2 else "black"
            text = f"{values[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=FONT_SIZE - 2)
    ratio_image(axes, values)


def _tick_places(n_expert: int) -> list[int]:
    step = 1 << max(0, math.ceil(math.log2(n_expert / 16)))
    return list(range(0, n_expert, step))


def _expert_ticks(axes: Axes, n_expert: int) -> None:
    axes.set_xticks(_tick_places(n_expert), [str(i) for i in _tick_places(n_expert)])


def _array(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=float)
