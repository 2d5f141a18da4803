"""The whole engine: each milestone's throughput and memory, token agreement, step costs, and the map of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from folovllm.course.viz.batching import Spread
from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREY,
    HATCHES,
    ORANGE,
    PALE,
    SERIES,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    new_figure,
    styled,
)

ROW = 0.27  # inches of a bar's row
LOST = "lost"
NO_SUCH_AXIS = "///"


# --- speed --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """The throughput of one milestone."""

    name: str
    speed: Spread  # output tokens per second
    over: Spread | None = None  # speed over that of the milestone before, in the same round


@dataclass(frozen=True)
class Segment:
    """A part of a bar, from `start` to `end`: the gain of milestone `of`, or this milestone's loss (`of` None)."""

    of: int | None
    start: float
    end: float


def bar_segments(values: Sequence[float]) -> list[list[Segment]]:
    """The bars of a waterfall: each has the segments of the bar before, and one for its own gain.

    A milestone that is slower than the one before cuts off the end of that bar, and has a last segment for the loss.
    """
    bars: list[list[Segment]] = []
    kept: list[Segment] = []
    before = 0.0
    for index, value in enumerate(values):
        kept = [Segment(s.of, s.start, min(s.end, value)) for s in kept if s.start < value]
        if value > before:
            kept = [*kept, Segment(index, before, value)]
        bars.append([*kept, *([Segment(None, value, before)] if value < before else [])])
        before = value
    return bars


@styled
def speed_waterfall(
    panels: Mapping[str, Sequence[Rung]],
    peers: Mapping[str, Mapping[str, Spread]] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Output tokens per second of the milestones, one below the other, a panel per workload.

    Each bar (at the median of the rounds) has a segment for the gain of each milestone so far, in a colour that is the
    same in all panels. A hatched white segment is a loss. At the right: tokens per second, and the ratio to the
    milestone above; in the last row, in bold, the ratio to the first. peers: panel -> name -> tokens per second, a
    dotted line each.
    """
    heights = [0.35 + ROW * len(rungs) for rungs in panels.values()]
    figure, axes = new_figure(
        0.55 + 0.3 * (title is not None) + sum(heights), len(panels), 1, title, height_ratios=heights
    )
    names = [rung.name for rungs in sorted(panels.values(), key=len, reverse=True) for rung in rungs]
    order = list(dict.fromkeys(names))
    for ax, (name, rungs) in zip(axes, panels.items(), strict=True):
        values = [rung.speed["median"] for rung in rungs]
        known = (peers or {}).get(name, {})
        longest = max(*values, *(spread["median"] for spread in known.values()))
        for row, segments in enumerate(bar_segments(values)):
            for part in segments:
                color, hatch = (WHITE, "xxxx") if part.of is None else rung_look(order.index(rungs[part.of].name))
                ax.barh(row, part.end - part.start, 0.7, left=part.start, color=color, hatch=hatch, lw=0.5,
                        ec=VERMILLION if part.of is None else WHITE,
                        label=LOST if part.of is None else rungs[part.of].name)  # fmt: skip
            _note_rung(ax, row, rungs, max(values[row], values[row - 1] if row else 0.0))
        for peer, spread in known.items():
            ax.axvline(spread["median"], color=BLACK, ls=":", lw=1.4, label=f"peer: {peer}")
            ax.annotate(peer, (spread["median"], -0.62), (3, 0), textcoords="offset points", size=7.5, va="center")
        _rows(ax, [rung.name for rung in rungs], longest)
        ax.set_ylim(len(rungs) - 0.45, -0.95 if known else -0.55)
        ax.set_title(name)
    axes[-1].set_xlabel("output tokens per second")
    return figure


def rung_look(index: int) -> tuple[str, str]:
    """Colour and hatch of a milestone's gain, by its index in the longest panel."""
    return (GREY, "") if index == 0 else (SERIES[(index - 1) % len(SERIES)], HATCHES[(index - 1) % len(HATCHES)])


def _note_rung(ax: Axes, row: int, rungs: Sequence[Rung], end: float) -> None:
    rung, last = rungs[row], row == len(rungs) - 1
    text = short_number(rung.speed["median"])
    if rung.over is not None:
        text += f"   x {rung.over['median']:.2f}"
    paper = {"fc": WHITE, "ec": "none", "pad": 0.8}  # covers the line of a peer
    ax.annotate(text, (end, row), (5, 0), textcoords="offset points", va="center", size=8.5, bbox=paper)
    if last and row:
        whole = rung.speed["median"] / rungs[0].speed["median"]
        ax.annotate(f"x {whole:.1f} in all", (1, row), xycoords=("axes fraction", "data"), va="center", ha="right",
                    size=8.5, weight="bold")  # fmt: skip


def _rows(ax: Axes, names: Sequence[str], longest: float) -> None:
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.42 * longest)
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 or not value else f"{value:g}")
    )


def short_number(value: float) -> str:
    """Three significant digits: 1,230 and 45.0 and 0.789."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 99.95 else f"{value:#.3g}"


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Peak bytes of K/V that a milestone reserved, and peak bytes that requests used."""

    name: str
    reserved: float
    used: float


@styled
def memory_waterfall(panels: Mapping[str, Sequence[Held]], *, title: str | None = None) -> Figure:
    """K/V of the milestones, one below the other: a pale bar for reserved memory, a dark one for used memory.

    At the right: reserved MiB, and the used share.
    """
    heights = [0.35 + ROW * len(rows) for rows in panels.values()]
    figure, axes = new_figure(
        0.9 + 0.3 * (title is not None) + sum(heights), len(panels), 1, title, height_ratios=heights
    )
    for ax, (name, held) in zip(axes, panels.items(), strict=True):
        for row, one in enumerate(held):
            ax.barh(row, one.reserved / 2**20, 0.7, color=PALE, ec=GREY, lw=0.5, hatch="///", label="reserved")
            ax.barh(row, one.used / 2**20, 0.42, color=BLUE, label="used")
            text = f"{short_number(one.reserved / 2**20)} MiB, {one.used / one.reserved:.0%} used"
            ax.annotate(text, (one.reserved / 2**20, row), (5, 0), textcoords="offset points", va="center", size=8.5)
        _rows(ax, [one.name for one in held], max(one.reserved for one in held) / 2**20)
        ax.set_title(name)
    axes[-1].set_xlabel("peak K/V, MiB")
    figure.legend(
        handles=[Patch(fc=PALE, ec=GREY, lw=0.5, hatch="///"), Patch(fc=BLUE)],
        labels=["reserved for requests", "used: holds K/V of a request"],
        loc="outside lower left",
        ncols=2,
    )
    return figure


# --- agreement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How many of `total` requests have exactly the reference's tokens, and the preemptions of the run."""

    same: int
    total: int
    preemptions: int = 0


@styled
def same_token_matrix(
    rows: Mapping[str, Sequence[Agreement | None]],
    headers: Sequence[Sequence[tuple[str, int]]],
    *,
    title: str | None = None,
) -> Figure:
    """A cell per setting, with the number of requests whose tokens are the reference's: blue if all are, else red.

    rows: name -> a cell per column; None (hatched) where a milestone has no such setting. headers: lines above the
    columns, each of (text, columns that it spans). A number in brackets counts the preemptions of that run. Raises
    ValueError for a row or a header line of another width than the first row's.
    """
    width = len(next(iter(rows.values())))
    for name, cells in rows.items():
        if len(cells) != width:
            raise ValueError(f"rows[{name!r}] has {len(cells)} cells; allowed: {width}, as in the first row")
    for spans in headers:
        columns = sum(span for _, span in spans)
        if columns != width:
            raise ValueError(f"headers has a line of {columns} columns; allowed: {width}")
    figure, (ax,) = new_figure(0.5 + 0.3 * (title is not None) + 0.33 * (len(rows) + len(headers)), title=title)
    top = -len(headers)
    for level, line in enumerate(headers):
        left = 0
        for text, span in line:
            ax.text(left + span / 2, top + level + 0.5, text, ha="center", va="center", size=8)
            if span < width and level < len(headers) - 1:
                ax.plot([left + 0.06, left + span - 0.06], [top + level + 0.95] * 2, color=GREY, lw=0.8)
            left += span
    for row, cells in enumerate(rows.values()):
        for column, cell in enumerate(cells):
            _draw_agreement(ax, row, column, cell)
    left = 0
    for _, span in headers[0][:-1]:
        left += span
        ax.plot([left, left], [top, len(rows)], color=BLACK, lw=1.2)
    ax.set_yticks([row + 0.5 for row in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlim(0, width)
    ax.set_ylim(len(rows), top)
    figure.legend(
        handles=[
            Patch(fc=SKY, ec=GREY, lw=0.6),
            Patch(fc=VERMILLION, ec=GREY, lw=0.6),
            Patch(fc=WHITE, ec=GREY, lw=0.6, hatch=NO_SUCH_AXIS),
        ],
        labels=["all requests have the reference's tokens", "some differ", "no such setting"],
        loc="outside lower left",
        ncols=3,
    )
    return figure


def _draw_agreement(ax: Axes, row: int, column: int, cell: Agreement | None) -> None:
    if cell is None:
        ax.add_patch(Rectangle((column, row), 1, 1, fc=WHITE, ec=PALE, lw=0.6, hatch=NO_SUCH_AXIS))
        return
    right = cell.same == cell.total
    ax.add_patch(Rectangle((column, row), 1, 1, fc=SKY if right else VERMILLION, ec=WHITE, lw=1))
    text = f"{cell.same}/{cell.total}" + (f"\n({cell.preemptions})" if cell.preemptions else "")
    ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=7.5, linespacing=1.0,
            color=BLACK if right else WHITE, weight="normal" if right else "bold")  # fmt: skip


# --- step costs ---------------------------------------------------------------------------------------------------

PARTS = (("fixed", GREY, ""), ("per token", BLUE, "///"), ("per query-key pair", ORANGE, "..."))


@styled
def step_costs(
    runs: Mapping[str, Sequence[tuple[float, float, float]]], target: float, *, title: str | None = None
) -> Figure:
    """The cost of steps by part: one panel per run on one scale, a bar per step, in milliseconds.

    runs: name -> (fixed, for tokens, for query-key pairs) of each step. A dashed line is the target.
    """
    figure, axes = new_figure(
        0.85 + 0.3 * (title is not None) + 1.15 * len(runs), len(runs), 1, title, sharex=True, sharey=True
    )
    highest = max(target, *(sum(parts) for steps in runs.values() for parts in steps))
    for ax, (name, steps) in zip(axes, runs.items(), strict=True):
        bottom = [0.0] * len(steps)
        for index, (label, color, hatch) in enumerate(PARTS):
            heights = [parts[index] for parts in steps]
            ax.bar(range(len(steps)), heights, 0.86, bottom=bottom, color=color, hatch=hatch, ec=WHITE, lw=0.4,
                   label=label)  # fmt: skip
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        ax.axhline(target, color=BLACK, ls="--", lw=1.2, label="target")
        ax.set_title(f"{name}: {len(steps)} steps, {sum(bottom):,.0f} ms")
        ax.set_ylabel("ms")
        ax.set_ylim(0, 1.12 * highest)
    axes[-1].set_xlim(-0.7, max(map(len, runs.values())) - 0.3)
    axes[-1].set_xlabel("step with a chunk of the long prompt")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A part of the engine."""

    name: str
    file: str
    stops: Sequence[int] = ()  # steps of a request's path through the engine
    column: int = 0


@dataclass(frozen=True)
class Layer:
    """A layer: its name, its subject, rows of boxes from the top, and the data passed down and up below it."""

    name: str
    about: str
    rows: Sequence[Sequence[Box]]
    down: str = ""
    up: str = ""


COLUMNS = 4  # of boxes
BOX_WIDTH, BOX_HEIGHT, HEAD, GAP = 0.93, 0.7, 0.42, 0.42


@styled
def layer_map(layers: Sequence[Layer], *, title: str | None = None) -> Figure:
    """Layers as bands, from the top, with boxes in them. Circled numbers are the steps of a request's path.

    Between two bands: the data that the upper one passes down and the data that comes back.
    """
    depth = [HEAD + (BOX_HEIGHT + 0.18) * len(layer.rows) + 0.04 for layer in layers]
    total = sum(depth) + GAP * (len(layers) - 1)
    figure, (ax,) = new_figure(0.1 + 0.3 * (title is not None) + 0.62 * total, title=title)
    y = 0.0
    for index, (layer, height) in enumerate(zip(layers, depth, strict=True)):
        fill = (SKY, PALE, YELLOW)[index % 3]
        ax.add_patch(Rectangle((0, y), COLUMNS, height, fc=fill, ec=GREY, lw=0.8, alpha=0.45))
        ax.text(0.08, y + 0.22, layer.name, size=9.5, weight="bold", va="center")
        ax.text(COLUMNS - 0.08, y + 0.22, layer.about, size=8.5, va="center", ha="right", color=BLACK)
        for line, boxes in enumerate(layer.rows):
            for box in boxes:
                _draw_box(ax, box, y + HEAD + line * (BOX_HEIGHT + 0.18))
        y += height
        if index < len(layers) - 1:
            for x, text, (start, end) in ((0.9, layer.down, (y, y + GAP)), (2.9, layer.up, (y + GAP, y))):
                ax.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "-|>", "color": BLACK, "lw": 1.2})
                ax.text(x + 0.07, y + GAP / 2, text, size=8, va="center")
            y += GAP
    ax.set_xlim(-0.02, COLUMNS + 0.02)
    ax.set_ylim(total + 0.03, -0.03)
    ax.set_axis_off()
    return figure


def _draw_box(ax: Axes, box: Box, top: float) -> None:
    left = box.column + (1 - BOX_WIDTH) / 2
    ax.add_patch(
        FancyBboxPatch((left, top), BOX_WIDTH, BOX_HEIGHT, boxstyle="round,pad=0,rounding_size=0.05", fc=WHITE,
                       ec=GREY, lw=0.9)
    )  # fmt: skip
    ax.text(left + 0.06, top + 0.24, box.name, size=8.5, weight="bold", va="center")
    ax.text(left + 0.06, top + 0.5, box.file, size=7.5, va="center", color=BLACK)
    for number, stop in enumerate(box.stops):
        x = left + BOX_WIDTH - 0.1 - 0.17 * (len(box.stops) - 1 - number)
        ax.plot([x], [top + 0.22], marker="o", ms=12, color=BLACK, label="stop")
        ax.text(x, top + 0.225, str(stop), size=7.5, color=WHITE, ha="center", va="center", weight="bold")
