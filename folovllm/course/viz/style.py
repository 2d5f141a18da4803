"""The style of every figure of the course: colours, sizes, and the drawing helpers that several figures share.

A figure is 7 inches wide and shown 700 pixels wide, so a font of 9 points has 12.5 pixels. The colours are those of
Okabe and Ito (jfly.uni-koeln.de/color), which are distinct for any kind of colour vision; a marker, a hatch or a label
always repeats what a colour says. pyplot is not used, so figures are in no global list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

P = ParamSpec("P")

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE, WHITE = "#6B6B6B", "#E6E6E6", "#FFFFFF"

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)  # in the order of use
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")

WIDTH = 7.0  # inches
PIXELS_PER_INCH = 100  # on the page; the PNG has twice as many, for screens with dense pixels

RC: Mapping[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.9,
    "legend.edgecolor": WHITE,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "figure.facecolor": WHITE,
    "figure.dpi": PIXELS_PER_INCH,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "font.family": ["DejaVu Sans"],
    "axes.unicode_minus": False,
}


class CourseFigure(Figure):
    """A figure that a notebook displays whatever backend is set."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture, and its size in pixels on a page (IPython's protocol).

        A palette of 128 colours is enough for every figure and makes the committed notebooks much smaller.
        """
        drawn, data = BytesIO(), BytesIO()
        self.savefig(drawn, format="png", dpi=2 * PIXELS_PER_INCH, facecolor=WHITE)
        with Image.open(drawn) as picture:
            small = picture.convert("RGB").quantize(colors=128, dither=Image.Dither.NONE)
        small.save(data, format="png", optimize=True)
        width, height = self.get_size_inches()
        return data.getvalue(), {"width": round(width * PIXELS_PER_INCH), "height": round(height * PIXELS_PER_INCH)}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under the course's rcParams, without changing the caller's."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(dict(RC)):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(
    height: float, rows: int = 1, columns: int = 1, title: str | None = None, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of the course's width and of `height` inches, and its axes, row by row.

    `subplots` goes to `Figure.subplots` (`sharex`, `width_ratios`, ...). `title` is above all axes, at the left.
    """
    figure = CourseFigure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    return figure, list(axes.flat)


@dataclass(frozen=True)
class Kind:
    """A kind of grid cell: its name in the legend, its colour, and a mark that identifies it without colour."""

    label: str
    color: str
    marker: str = ""  # a matplotlib marker; "": an empty cell
    ink: str = WHITE  # of the marker


def draw_cells(ax: Axes, codes: ArrayLike, kinds: Sequence[Kind], mark_size: float = 16) -> NDArray[np.int64]:
    """Draw a grid `codes` [R, C] of indices into `kinds`, row 0 at the top, and return the codes.

    The axes have one image, which holds the codes. Each kind with a marker that occurs has one collection, labelled
    with the kind's name, with a mark at (column, row) of each of its cells.
    """
    grid = np.asarray(codes, dtype=np.int64)
    if grid.ndim != 2 or grid.size == 0 or grid.min() < 0 or grid.max() >= len(kinds):
        raise ValueError(f"codes of shape {list(grid.shape)}: must be a grid [R, C] of 0 to {len(kinds) - 1}")
    colors = ListedColormap([kind.color for kind in kinds])
    ax.imshow(grid, cmap=colors, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto", interpolation="nearest")
    for code, kind in enumerate(kinds):
        cells = np.argwhere(grid == code)
        if kind.marker and len(cells):
            ax.scatter(
                cells[:, 1], cells[:, 0], s=mark_size, marker=kind.marker, color=kind.ink, label=kind.label, lw=0.9
            )
    for edges, limit in ((ax.set_xticks, grid.shape[1]), (ax.set_yticks, grid.shape[0])):
        edges(np.arange(limit + 1) - 0.5, minor=True)
    ax.grid(False)
    ax.grid(which="minor", color=GREY, linewidth=0.4)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set(visible=True, color=GREY, linewidth=0.6)
    ax.set_xlim(-0.5, grid.shape[1] - 0.5)
    ax.set_ylim(grid.shape[0] - 0.5, -0.5)
    return grid


def legend_of_kinds(figure: Figure, kinds: Sequence[Kind], columns: int | None = None) -> None:
    """A legend of cell kinds under the figure, each with its colour and its mark."""
    handles = [
        (
            Patch(facecolor=kind.color, edgecolor=GREY, linewidth=0.6),
            Line2D([], [], linestyle="", marker=kind.marker or "", color=kind.ink, markersize=4.5),
        )
        for kind in kinds
    ]
    figure.legend(
        handles=handles,
        labels=[kind.label for kind in kinds],
        handler_map={tuple: HandlerTuple(ndivide=1, pad=0)},
        loc="outside lower left",
        ncols=columns or len(kinds),
        handlelength=1.4,
        handleheight=1.2,
        columnspacing=1.6,
    )


def label_positions(length: int, most: int = 16) -> list[int]:
    """Indices below `length` to label: all of them, or every 2nd, 5th, 10th, 20th, ... if there are over `most`."""
    steps = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    step = next(step for step in steps if length <= step * most)
    return list(range(0, length, step))


def engineering(value: float, unit: str) -> str:
    """A number with three significant digits and an SI prefix: `engineering(24_704, "")` is "24.7k"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}{unit}".rstrip() if unit else f"{value / factor:.3g}{prefix}"
    return f"{value:.3g} {unit}".rstrip()


def binary_bytes(value: float) -> str:
    """Bytes in binary units: `binary_bytes(524_288)` is "512 KiB"."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g} B"
