"""The pictures of a study: loss, balance, and each arm's difference from the control."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from litgpt_moe_ext.pictures.style import STYLE, begin_at_zero, dots_of, legend_below, line_of
from litgpt_moe_ext.study.report.compare import Difference
from litgpt_moe_ext.study.results import EVEN, MAX_VIO, Curve, Result
from litgpt_moe_ext.study.search import by_place, mean_val_loss

# Values on either side of one that a smoothed curve takes into account, at most so many or this share of the curve.
_HALF, _HALF_SHARE = 4, 0.1


def difference_figure(found: dict[str, Difference]) -> Figure:
    """Draw every group's difference from the control: its own interval, the joint one, and each seed's value."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.26 * len(found)), layout="constrained")
        axes = figure.subplots()
        for row, difference in enumerate(found.values()):
            alone, together = difference.alone, difference.together
            axes.plot(together[1:], (row, row), color="C0", linewidth=0.9)
            axes.plot(alone[1:], (row, row), color="C0", linewidth=3.2, alpha=0.55, solid_capstyle="butt")
            axes.plot(difference.pairs, [row] * len(difference.pairs), "o", color="#777777", markersize=2.2)
            axes.plot(alone.value, row, "o", color="C0", markersize=4.5)
        axes.axvline(0, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(found)), labels=list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel("validation loss minus that of the control, nats per token")
        axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    return figure


def loss_figure(groups: dict[str, list[Result]]) -> Figure:
    """Draw the loss of each group over tokens, FLOPs and, for runs that did not share their device, seconds."""
    axes_of: list[tuple[str, Callable[[Result, Curve], np.ndarray]]] = [
        ("tokens", lambda _result, curve: curve.tokens),
        ("training FLOPs", lambda result, curve: curve.tokens * result.flops_per_token),
    ]
    if all(result.timed for group in groups.values() for result in group):
        axes_of.append(("seconds", lambda _result, curve: curve.seconds))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axes, (name, place) in zip(figure.subplots(1, len(axes_of), sharey=True), axes_of, strict=True):
            for i, group in enumerate(groups.values()):
                curves = [
                    (place(result, curve), smooth(curve.values)) for result in group for curve in [result.curve("loss")]
                ]
                axes.plot(*mean(curves), linewidth=1.1, **line_of(i))
                for result in group:
                    curve = result.curve("val_loss")
                    axes.plot(place(result, curve), curve.values, markersize=3, **dots_of(i))
            axes.set_xlabel(name)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.25, linewidth=0.5)
        # Leave out the steep start, where all arms are alike: it would squeeze the part where they differ.
        drawn = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines]
        drawn = [loss[np.isfinite(loss)] for loss in drawn]
        figure.axes[0].set_ylim(
            top=max((float(loss[len(loss) // 4 :].max()) for loss in drawn if len(loss)), default=None)
        )
        figure.axes[0].set_ylabel("loss, nats per token")
        _legend(figure, groups)
    return figure


def search_figure(searched: Sequence[str], groups: dict[str, list[Result]]) -> Figure:
    """Draw the validation loss of every point over each searched setting."""
    places = by_place(searched, groups)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, min(10.0, 3.4 * len(searched))), 3.2), layout="constrained")
        panels = figure.subplots(1, len(searched), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, searched, strict=True):
            numbers = [group[0].run.point[name] for group in groups.values()]
            numeric = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
            for i, points in enumerate(places.values()):
                values = [group[0].run.point[name] for group in points.values()]
                losses = [mean_val_loss(group) for group in points.values()]
                axes.plot(values if numeric else list(map(str, values)), losses, markersize=4, **dots_of(i))
            if numeric and 0 < min(numbers) * 9 < max(numbers):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter("")
            axes.set_xlabel(name)
            axes.grid(alpha=0.25, linewidth=0.5)
        panels[0].set_ylabel("validation loss, nats per token")
        legend_below(figure, [(label, dots_of(i)) for i, label in enumerate(places)])
    return figure


def balance_figure(groups: dict[str, list[Result]]) -> Figure:
    """Draw MaxVio of each group over tokens."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for i, group in enumerate(groups.values()):
            curves = [result.log.series(MAX_VIO) for result in group if len(result.log.series(MAX_VIO)[1])]
            if not curves:
                continue
            length = min(len(values) for _, values in curves)
            tokens, values = curves[0][0][:length], np.stack([values[:length] for _, values in curves])
            axes.plot(tokens, values.mean(axis=0), linewidth=1.1, **line_of(i))
            axes.fill_between(
                tokens, values.min(axis=0), values.max(axis=0), color=line_of(i)["color"], alpha=0.15, linewidth=0
            )
        axes.axhline(EVEN, color="#777777", linewidth=0.8, linestyle=":")
        begin_at_zero(axes)
        axes.set_xlabel("tokens")
        axes.set_ylabel("MaxVio")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25, linewidth=0.5)
        _legend(figure, groups, [label for label, group in groups.items() if len(group[0].log.series(MAX_VIO)[1])])
    return figure


def _legend(figure: Figure, groups: Mapping[str, Any], shown: Sequence[str] | None = None) -> None:
    # An arm has the same line in every picture.
    named = enumerate(groups)
    legend_below(figure, [(label, line_of(i)) for i, label in named if shown is None or label in shown])


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a curve with each value replaced by that of a straight line through the values around it.

    An average of past values would lag behind a falling loss, in seconds the more the slower the steps: of two models
    that are level at any time, the faster one would seem to be ahead.

    Args:
        values: The curve; from its first value on that is not finite, the result is infinite.
    """
    gaps = np.flatnonzero(~np.isfinite(values))
    end = int(gaps[0]) if len(gaps) else len(values)
    smoothed = np.full(len(values), np.inf)
    half = min(_HALF, int(end * _HALF_SHARE))
    width = 2 * half + 1
    # In the middle of its values, a line has their mean.
    smoothed[half : end - half] = np.convolve(values[:end], np.full(width, 1 / width), "valid") if end else []
    for i in (*range(half), *range(end - half, end)):
        # The curve is steepest at the start, so fewer values there; its end is what runs are compared by.
        around = np.arange(max(0, min(i - half, end - width)), min(end, i + half + 1))
        offset = around - around.mean()
        slope = offset @ values[around] / (offset @ offset)
        smoothed[i] = values[around].mean() + slope * (i - around.mean())
    return smoothed


def mean(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of curves, up to the end of the shortest; empty if there are none."""
    if not curves:
        return np.empty(0), np.empty(0)
    length = min(len(values) for _, values in curves)
    places, values = (np.mean([line[k][:length] for line in curves], axis=0) for k in (0, 1))
    return places, values
