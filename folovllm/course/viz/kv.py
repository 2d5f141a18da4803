"""The KV cache: which cells are computed, their bytes, the time they save, and that cached values never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike

from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    MARKERS,
    ORANGE,
    SERIES,
    SKY,
    VERMILLION,
    WHITE,
    Kind,
    binary_bytes,
    draw_cells,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)

ABSENT = Kind("not there yet", WHITE)
REUSED = Kind("read from the cache", SKY, ".")
COMPUTED = Kind("computed in this step", VERMILLION, "x")
KINDS = ("MHA", "GQA", "MQA", "MLA")


@styled
def kv_cells(fed: Mapping[str, Sequence[tuple[int, int]]], *, title: str | None = None) -> Figure:
    """Which K/V cells each step computes and which it reuses: one grid per loop, side by side.

    fed: loop -> for each step the range (start, end) of positions that went through the layers. A row is a step, a
    column a position: positions start..end-1 are computed (crossed), earlier ones are reused (dotted), later ones do
    not exist yet. Each grid's title counts the cells computed.
    """
    last = max(end for steps in fed.values() for _, end in steps)
    most = max(len(steps) for steps in fed.values())
    figure, axes = new_figure(1.15 + 0.24 * most, 1, len(fed), title)
    for index, (ax, (name, steps)) in enumerate(zip(axes, fed.items(), strict=True)):
        codes = np.zeros((len(steps), last), dtype=np.int64)
        for row, (start, end) in enumerate(steps):
            codes[row, :start] = 1
            codes[row, start:end] = 2
        draw_cells(ax, codes, (ABSENT, REUSED, COMPUTED))
        ax.set_title(f"{name}: {int((codes == 2).sum())} cells computed")
        ax.set_xticks(label_positions(last))
        shown = label_positions(len(steps))
        ax.set_yticks(shown, [str(i + 1) for i in shown])
        ax.set_xlabel("position in the text")
        if index == 0:
            ax.set_ylabel("step")
    legend_of_kinds(figure, (COMPUTED, REUSED, ABSENT))
    return figure


@styled
def kv_drift(drift: Mapping[str, ArrayLike], *, title: str | None = None) -> Figure:
    """How much cached values changed: grids [layers, positions] of largest differences, one per entry.

    A cell says "same" where no bit changed, else the power of ten that bounds the difference: -6 for 3e-7. Darker is
    larger, on one scale for all grids.
    """
    grids = {name: np.asarray(values, dtype=float) for name, values in drift.items()}
    layers, length = next(iter(grids.values())).shape
    figure, axes = new_figure(0.45 + len(grids) * (0.75 + 0.26 * layers), len(grids), 1, title)
    for ax, (name, grid) in zip(axes, grids.items(), strict=True):
        if grid.shape != (layers, length):
            raise ValueError(f"drift[{name!r}] has shape {list(grid.shape)}: must be {[layers, length]}")
        powers = np.ceil(np.log10(np.where(grid > 0, grid, 1e-9)))
        ax.imshow(powers, cmap="Oranges", vmin=-9, vmax=2, aspect="auto")
        for row, column in np.ndindex(*grid.shape):
            text = f"{int(powers[row, column])}" if grid[row, column] > 0 else "same"
            ink = WHITE if powers[row, column] > -3 else BLACK
            ax.text(column, row, text, ha="center", va="center", size=7.5, color=ink)
        ax.set_title(name)
        ax.set_yticks(range(layers))
        ax.set_ylabel("layer")
        ax.set_xticks(label_positions(length, 24))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[-1].set_xlabel("position in the text (a cell's number p: changed by at most 10 to the power p)")
    return figure


@styled
def cache_timing(
    new_tokens: Sequence[int],
    ms_recompute: Sequence[float],
    ms_cached: Sequence[float],
    flop_ratio: Sequence[float],
    *,
    time_ratio: Sequence[float] | None = None,
    title: str | None = None,
) -> Figure:
    """With and without a cache, over the number of generated tokens n (logarithmic).

    Left: milliseconds per token of both loops, the mean over all n. Right: the measured ratio of times and the derived
    `flop_ratio`; each point is labelled with its value. time_ratio: if the times are medians of rounds, pass the
    median of the rounds' ratios, which is not the ratio of the medians. None: the quotients of the times shown.
    """
    figure, (left, right) = new_figure(3.1, 1, 2, title)
    n = np.asarray(new_tokens)
    for name, values, color, marker, dash in (
        ("without a cache", ms_recompute, VERMILLION, MARKERS[1], "--"),
        ("with a cache", ms_cached, BLUE, MARKERS[0], "-"),
    ):
        left.plot(n, values, dash, color=color, marker=marker, label=name)
    left.set_title("milliseconds per token")
    left.set_ylim(bottom=0)
    times = np.asarray(ms_recompute) / np.asarray(ms_cached) if time_ratio is None else np.asarray(time_ratio)
    for name, ratio, color, marker, dash, above in (
        ("FLOPs, derived", np.asarray(flop_ratio), GREEN, MARKERS[2], "--", True),
        ("time, measured", times, ORANGE, MARKERS[3], "-", False),
    ):
        right.plot(n, ratio, dash, color=color, marker=marker, label=name)
        for x, y in zip(n, ratio, strict=True):
            offset = (0, 6) if above else (0, -13)
            right.annotate(f"{y:.3g}", (x, y), offset, textcoords="offset points", ha="center", size=8)
    right.set_title("without over with")
    right.set_yscale("log")
    right.set_ylim(min(times.min(), min(flop_ratio)) / 2.2, max(times.max(), max(flop_ratio)) * 1.8)
    right.margins(x=0.09)  # space for the labels of the first and the last point
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(n, [str(v) for v in new_tokens])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("tokens generated")
        ax.grid(axis="y")
        ax.legend(loc="upper left")
    return figure


@styled
def kv_bytes_bars(rows: Sequence[tuple[str, str, int]], *, title: str | None = None) -> Figure:
    """Bytes of KV cache per token as horizontal bars in the order given, one (name, kind, bytes) each.

    kind: "MHA", "GQA", "MQA" or "MLA"; each has its own colour and hatch. Bars are labelled in binary units.
    """
    unknown = {kind for _, kind, _ in rows} - set(KINDS)
    if unknown:
        raise ValueError(f"kind={unknown.pop()!r}: must be one of {', '.join(KINDS)}")
    figure, (ax,) = new_figure(0.95 + 0.31 * len(rows), title=title)
    for index, kind in enumerate(KINDS):
        own = [(i, size) for i, (_, k, size) in enumerate(rows) if k == kind]
        if not own:
            continue
        ax.barh(
            [i for i, _ in own],
            [size for _, size in own],
            color=SERIES[index],
            hatch=HATCHES[index],
            edgecolor=WHITE,
            height=0.72,
            label=kind,
        )
    for i, (_, _, size) in enumerate(rows):
        ax.annotate(binary_bytes(size), (size, i), (4, 0), textcoords="offset points", va="center", size=8.5)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, max(size for _, _, size in rows) * 1.16)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_bytes(value) if value else "0"))
    ticks = np.linspace(0, 2 ** np.ceil(np.log2(max(size for _, _, size in rows))), 5)
    ax.set_xticks(ticks[ticks <= ax.get_xlim()[1]])
    ax.set_xlabel("bytes of K and V per token, all layers")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_color(GREY)
    figure.legend(loc="outside lower left", ncols=len(KINDS))
    return figure
