"""The style of pictures: sizes for a paper, and one colour scale for ratios around 1."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

FONT_SIZE = 8
# Fonts of Linux, Windows and macOS with Chinese, Japanese or Korean characters, which matplotlib's own font lacks.
_CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAexGothic", "IPAGothic", "NanumGothic", "Unifont"),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "Malgun Gothic"),
    *("PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
)


def font_families() -> list[str]:
    """Return matplotlib's font families, followed by this machine's fonts for characters that they lack."""
    installed = set(fontManager.get_font_names())
    return [*matplotlib.rcParams["font.family"], *(name for name in _CJK_FONTS if name in installed)]


STYLE = {
    "font.family": font_families(),
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE + 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names of runs and arms may contain dollar signs
}
# The colours range from a quarter of to four times an even share; nan is grey.
LARGEST_LOG2 = 2.0
_RATIOS: dict[str, Any] = {
    "norm": Normalize(-LARGEST_LOG2, LARGEST_LOG2),
    "cmap": matplotlib.colormaps["RdBu_r"].with_extremes(bad="#d9d9d9"),
}
# matplotlib's colours come first, then the next line style with the same ones.
_COLORS, _LINE_STYLES, _MARKERS = range(10), ("-", "--", ":", "-."), ("o", "s", "^", "D")
# In inches.
_BAR_THICKNESS, _LONGEST_BAR = 0.13, 4.0
# Characters of text per inch, and the length of a legend entry's line in characters.
_IN_AN_INCH, _LINE = 11, 6


def ratio_image(axes: Axes, values: np.ndarray, **options: Any) -> None:
    """Draw ratios around 1 as colours.

    Args:
        axes: Where to draw.
        values: Ratios, (rows, columns).
        **options: Further arguments of `Axes.imshow`.
    """
    axes.imshow(clipped_log2(values), aspect="auto", interpolation="nearest", **_RATIOS, **options)


def clipped_log2(values: np.ndarray) -> np.ndarray:
    """Return the base-2 logarithms of ratios, clipped to the range of the colours."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log2(values), -LARGEST_LOG2, LARGEST_LOG2)


def ratio_bar(figure: Figure, label: str = "ratio") -> None:
    """Add the scale of `ratio_image` to a figure, one for all its axes."""
    bar = color_bar(figure, ScalarMappable(**_RATIOS), figure.axes, label, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])


def color_bar(figure: Figure, colors: ScalarMappable, axes: Sequence[Axes], label: str, **options: Any) -> Colorbar:
    """Add a colour bar as thick as the text beside it, for any height of the figure.

    Args:
        figure: The figure.
        colors: The colours that the bar explains.
        axes: Axes that make room for it.
        label: Its title.
        **options: Further arguments of `Figure.colorbar`.
    """
    height = figure.get_figheight()
    length = min(0.8 * height, _LONGEST_BAR)
    shape = {"shrink": length / height, "aspect": length / _BAR_THICKNESS, "pad": 0.01}
    return figure.colorbar(colors, ax=list(axes), label=label, **shape, **options)


def line_of(number: int) -> dict[str, Any]:
    """Return colour and line style of the curve with a number; all of forty look different."""
    return {"color": f"C{number % len(_COLORS)}", "linestyle": _LINE_STYLES[number // len(_COLORS) % len(_LINE_STYLES)]}


def dots_of(number: int) -> dict[str, Any]:
    """Return colour and shape of the dots that belong to the curve with a number."""
    return {
        "color": f"C{number % len(_COLORS)}",
        "marker": _MARKERS[number // len(_COLORS) % len(_MARKERS)],
        "linestyle": "",
    }


def legend_below(figure: Figure, lines: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Add a legend of lines below a figure, in as many columns as fit.

    Args:
        figure: The figure.
        lines: Name of each line, and how it is drawn; the beginning of a name that is too long is cut off.
    """
    room = int(_IN_AN_INCH * figure.get_figwidth())
    handles = [Line2D([], [], label=shortened(name, room - _LINE), **drawn) for name, drawn in lines]
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(4, room // (longest + _LINE))))


def title_above(figure: Figure, title: str) -> None:
    """Add a title above a figure, in as many lines as it needs."""
    figure.suptitle(textwrap.fill(title, int(_IN_AN_INCH * figure.get_figwidth())), fontsize=FONT_SIZE + 1)


def shortened(name: str, length: int) -> str:
    """Return a drawable name: without undecodable bytes, and if it is long, only its end, with a mark."""
    name = name.encode("utf-8", "replace").decode("utf-8")
    return name if len(name) <= length else f"…{name[1 - length :]}"


def begin_at_zero(axes: Axes) -> None:
    """Let the y axis begin at 0, and end above the highest value drawn so far."""
    highest = axes.dataLim.y1
    # matplotlib's own margin is a share of the range of the values: next to none if they are alike.
    axes.set_ylim(0, 1.05 * highest if np.isfinite(highest) and highest > 0 else None)


def whole_numbers(axes: Axes) -> None:
    """Restrict the ticks of the x axis to whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
