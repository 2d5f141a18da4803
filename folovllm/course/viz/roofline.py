"""What bounds a computation: the roofline model (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from folovllm.course.viz.style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    MARKERS,
    PALE,
    SERIES,
    VERMILLION,
    engineering,
    new_figure,
    styled,
)


@dataclass(frozen=True)
class RooflinePoint:
    """A measured computation: FLOPs per byte moved, FLOPs per second, and a kind that selects its marker."""

    label: str
    intensity: float
    flops_per_s: float
    kind: str


@styled
def gemm_sweep(
    rows: Sequence[int],
    seconds: Sequence[float],
    flops_per_row: float,
    weight_bytes: float,
    peak_flops: float,
    bandwidth: float,
    *,
    title: str | None = None,
) -> Figure:
    """A matrix of weights times m = `rows` vectors at once, both axes logarithmic.

    Left: measured milliseconds per call, and the two lower bounds: reading the weights once (`weight_bytes /
    bandwidth`, flat) and computing (`m * flops_per_row / peak_flops`, rising). Right: measured milliseconds per vector.
    The vertical line is the ridge, the m at which the two bounds are equal.
    """
    m, t = np.asarray(rows, dtype=float), np.asarray(seconds, dtype=float)
    ridge = weight_bytes / bandwidth * peak_flops / flops_per_row
    figure, (left, right) = new_figure(3.3, 1, 2, title)
    left.plot(m, np.full_like(m, 1e3 * weight_bytes / bandwidth), ":", color=GREEN, label="read the weights once")
    left.plot(m, 1e3 * m * flops_per_row / peak_flops, "--", color=VERMILLION, label="compute")
    left.plot(m, 1e3 * t, "-", color=BLUE, marker=MARKERS[0], label="measured")
    left.set_title("milliseconds per call")
    left.legend(loc="upper left")
    right.plot(m, 1e3 * t / m, "-", color=BLUE, marker=MARKERS[0], label="measured")
    right.set_title("milliseconds per vector")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(m[::2], [f"{v:g}" for v in m[::2]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("m, vectors multiplied at once")
        ax.grid(axis="y")
        ax.axvline(ridge, color=GREY, linewidth=1)
        ax.annotate(
            f"ridge: m = {ridge:.3g}", (ridge, 0.03), (4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=GREY, size=8.5,
        )  # fmt: skip
    low = min(t.min(), weight_bytes / bandwidth, flops_per_row / peak_flops)
    left.set_ylim(1e3 * low / 2, 1e3 * max(t.max(), m[-1] * flops_per_row / peak_flops) * 8)
    return figure


@styled
def roofline(
    peak_flops: float, bandwidth: float, points: Sequence[RooflinePoint], *, title: str | None = None
) -> Figure:
    """FLOPs per second over FLOPs per byte, both logarithmic: the two ceilings of a machine, and measured computations.

    The roof is min(`peak_flops`, intensity * `bandwidth`): rising where memory bounds, flat where arithmetic does. They
    meet at the ridge, peak_flops / bandwidth. Each point has a label; points of one kind share a marker. The bandwidth
    is written beside the slope, the peak above the flat part.
    """
    ridge = peak_flops / bandwidth
    values = [point.intensity for point in points]
    left, right = min([*values, ridge]) / 4, max([*values, ridge]) * 4
    x = np.geomspace(left, right, 200)
    figure, (ax,) = new_figure(4.0, title=title)
    ax.fill_between(x, np.minimum(peak_flops, x * bandwidth), color=PALE, alpha=0.55, lw=0)
    ax.plot(x, np.minimum(peak_flops, x * bandwidth), color="black", label="roof")
    for i, kind in enumerate(dict.fromkeys(point.kind for point in points)):
        own = [point for point in points if point.kind == kind]
        ax.plot(
            [p.intensity for p in own], [p.flops_per_s for p in own],
            linestyle="", marker=MARKERS[i], markersize=7, color=SERIES[i], label=kind,
        )  # fmt: skip
    slope = (left * ridge) ** 0.5  # the label of the rising roof is halfway up
    ax.annotate(
        engineering(bandwidth, "B/s"), (slope, slope * bandwidth), (-8, 6), textcoords="offset points", ha="right"
    )
    ax.annotate(engineering(peak_flops, "FLOP/s"), (right, peak_flops), (-2, 6), textcoords="offset points", ha="right")
    ax.axvline(ridge, color=GREY, linewidth=1, linestyle=":")
    ax.annotate(
        f"ridge: {ridge:.3g} FLOP per byte", (ridge, 0.03), (4, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", color=GREY, size=8.5,
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left, right)
    ax.set_ylim(min([*(p.flops_per_s for p in points), left * bandwidth]) / 2, peak_flops * 3)
    _label_points(ax, figure.get_size_inches(), points, peak_flops, bandwidth)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: engineering(value, "FLOP/s")))
    ax.set_xlabel("FLOP per byte moved")
    ax.grid(which="major")
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, 0.98))
    return figure


def _label_points(
    ax: Axes, size_inches: NDArray[np.float64], points: Sequence[RooflinePoint], peak_flops: float, bandwidth: float
) -> None:
    """Write each point's label at the first of eight places around it that is under the roof and overlaps nothing.

    Distances are in points of 1/72 inch. The axes' size is estimated, because the layout is known only when drawn.
    """
    low = np.log10([ax.get_xlim()[0], ax.get_ylim()[0]])
    scale = 72 * 0.8 * size_inches / (np.log10([ax.get_xlim()[1], ax.get_ylim()[1]]) - low)

    def on_paper(x: float, y: float) -> NDArray[np.float64]:
        return scale * (np.log10([x, y]) - low)

    kinds = list(dict.fromkeys(point.kind for point in points))
    places = [on_paper(p.intensity, p.flops_per_s) for p in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]  # left, bottom, right, top

    def faults(box: tuple[float, float, float, float]) -> int:
        x, y = 10 ** (np.array([box[0], box[3]]) / scale + low)  # the corner nearest to the roof
        covered = sum(box[0] < r and left < box[2] and box[1] < t and b < box[3] for left, b, r, t in taken)
        return covered + int(y > min(peak_flops, x * bandwidth))

    for point, (x, y) in zip(points, places, strict=True):
        wide, high = float(TextPath((0, 0), point.label, size=8.5).get_extents().width), 10.0
        beside, centre = (8.0, -8.0 - wide), -wide / 2
        options = [(dx, dy) for dy in (-11.0, -4.5, 3.0) for dx in beside] + [(centre, -17.0), (centre, 8.0)]
        boxes = [(x + dx, y + dy - 2, x + dx + wide, y + dy - 2 + high) for dx, dy in options]  # 2 below the baseline
        best = min(range(len(boxes)), key=lambda i: faults(boxes[i]))  # the first of the best
        taken.append(boxes[best])
        ax.annotate(
            point.label, (point.intensity, point.flops_per_s),
            (0 if options[best][0] == centre else 8 * np.sign(options[best][0]), options[best][1]),
            textcoords="offset points", ha={8.0: "left", centre: "center"}.get(options[best][0], "right"),
            size=8.5, color=SERIES[kinds.index(point.kind)],
        )  # fmt: skip


@styled
def attention_share(
    context: Sequence[int],
    shares: Mapping[str, ArrayLike],
    crossings: Mapping[str, float],
    *,
    title: str | None = None,
) -> Figure:
    """Attention's share of a model's FLOPs, in percent, over the context length (logarithmic): one line per entry.

    The dotted line is 50 %, where attention costs as much as the linear layers. `crossings`: the context lengths at
    which the lines cross it, each marked with its value.
    """
    figure, (ax,) = new_figure(3.4, title=title)
    for i, (name, share) in enumerate(shares.items()):
        ax.plot(context, 100 * np.asarray(share), linestyle=DASHES[i], color=SERIES[i], label=name)
        if name in crossings:
            ax.plot([crossings[name]], [50], marker=MARKERS[i], color=SERIES[i], markersize=7)
            ax.annotate(
                engineering(crossings[name], ""), (crossings[name], 50), (7, -12) if i else (-7, 6),
                textcoords="offset points", ha="left" if i else "right", color=SERIES[i], size=9, weight="bold",
            )  # fmt: skip
    ax.axhline(50, color=GREY, linewidth=1, linestyle=":")
    ax.set_xscale("log")
    ax.set_ylim(0, 100)
    ax.set_xlim(context[0], context[-1])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: engineering(value, "")))
    ax.set_xlabel("context length, tokens")
    ax.set_ylabel("attention, % of all FLOPs")
    ax.grid(axis="both")
    ax.legend(loc="upper left")
    return figure
