"""Blocks of K/V: which request holds which block, where memory is lost, how tables share, and which are preempted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from folovllm.course.lessons.fragmentation import SHARES, mean_empty_slots
from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    PURPLE,
    SERIES,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Kind,
    draw_cells,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)
from folovllm.course.viz.timeline import AWAY, DECODE, PREFILL, WAITING
from folovllm.engine.trace import StepTrace
from folovllm.kv_cache.interface import BlockSnapshot

FREE = Kind("free", WHITE)
SHARED = "shared"
DROPPED = Kind("preempted, K/V dropped", VERMILLION, "x")
ON_HOST = Kind("preempted, K/V on the host", PURPLE, "|", BLACK)
AGAIN = Kind("recomputes its K/V", SKY, "P", BLACK)

# % of K/V memory that holds tokens, Kwon et al. 2023, figure 2. `docs/claims/chapter_4.py` cites it; a test compares.
PAPER_FIG_2 = (("Orca (Max)", 20.4), ("Orca (Pow2)", 26.8), ("Orca (Oracle)", 38.2), ("vLLM", 96.3))
BEHIND = {"fc": WHITE, "ec": "none", "pad": 1.0, "alpha": 0.9}  # behind a number on a hatch
SLOT_LOOKS = {
    "used": ("K/V of a token", BLUE, ""),
    "reserved": ("reserved, written later", SKY, "///"),
    "internal": ("internal fragmentation", ORANGE, "xxx"),
    "external": ("external fragmentation", VERMILLION, "..."),
    "free": ("free", WHITE, ""),
}


# --- which request holds which block ---------------------------------------------------------------------------


@styled
def block_map(
    trace: Iterable[StepTrace], *, labels: Mapping[str, str] | None = None, title: str | None = None
) -> Figure:
    """The pool over time: a row per block, a column per step, the holder's colour in each cell, white where free.

    A shared block has the colour of its first holder, and a cross. Where the name fits, a stretch held by one request
    is named with its id or its entry in `labels`. A triangle above a step names the requests preempted in it. Host
    blocks have a panel of their own, if any were used. The trace needs snapshots (`trace_blocks=True`).
    """
    steps = list(trace)
    snapshots = snapshots_of(steps)
    ids = list(dict.fromkeys(i for snap in snapshots for i in (*snap.tables, *snap.host_tables)))
    names = {i: (labels or {}).get(i, i) for i in ids}
    kinds = [FREE]
    kinds += [Kind(names[i], request_color(row)) for row, i in enumerate(ids)]
    kinds += [Kind(SHARED, request_color(row), "x", BLACK) for row in range(len(ids))]
    device = holders([snap.tables for snap in snapshots], ids, len(snapshots[0].ref_cnt) - 1)
    host_blocks = max((b for snap in snapshots for table in snap.host_tables.values() for b in table), default=0)
    panels = {"device": device}
    if host_blocks:
        panels["host"] = holders([snap.host_tables for snap in snapshots], ids, host_blocks)
    heights = [0.3 + 0.17 * len(grid) for grid in panels.values()]
    figure, axes = new_figure(
        1.15 + 0.3 * (title is not None) + sum(heights), len(panels), 1, title, sharex=True, height_ratios=heights
    )
    for ax, (name, grid) in zip(axes, panels.items(), strict=True):
        draw_cells(ax, grid, kinds, mark_size=9)
        _name_stretches(ax, grid, [names[i] for i in ids])
        numbers = sorted({max(1, number) for number in label_positions(len(grid) + 1, 8)})
        ax.set_yticks([number - 1 for number in numbers], [str(number) for number in numbers])
        ax.set_ylabel(f"{name} block")
        ax.tick_params(labelbottom=ax is axes[-1])
    for column, step in enumerate(steps):
        if step.preempted:
            axes[0].scatter([column], [-1.1], s=26, marker="v", color=BLACK, clip_on=False, label="preempted")
            preempted = ", ".join(names.get(i, i) for i in step.preempted)
            axes[0].annotate(preempted, (column, -1.1), (0, 5), textcoords="offset points", ha="center", size=8,
                             annotation_clip=False)  # fmt: skip
    _label_steps(axes[-1], steps)
    shared = [Kind("shared", WHITE, "x", BLACK)] if (device > len(ids)).any() else []
    legend_of_kinds(figure, [*kinds[1 : len(ids) + 1], *shared, FREE], columns=min(8, len(ids) + 2))
    return figure


def snapshots_of(steps: Sequence[StepTrace]) -> list[BlockSnapshot]:
    """The state of the pool after each step. Raises ValueError for a trace that was recorded without it."""
    snapshots = [step.blocks for step in steps if step.blocks is not None]
    if not snapshots or len(snapshots) < len(steps):
        raise ValueError(
            f"trace has {len(snapshots)} snapshots of blocks in {len(steps)} steps; allowed: one per step, as "
            "an engine with trace_blocks=True records them"
        )
    return snapshots


def request_color(number: int) -> str:
    """The colour of the `number`-th request. Colours repeat after six."""
    return SERIES[number % len(SERIES)]


def holders(tables: Sequence[Mapping[str, Sequence[int]]], ids: Sequence[str], num_blocks: int) -> NDArray[np.int64]:
    """The holders of each block in each step, [blocks, steps]: 0 none, r + 1 request r alone, N + r + 1 r and others.

    tables: per step, request id -> block numbers, which begin at 1. Of several holders, r is the first in `ids`.
    """
    codes = np.zeros((num_blocks, len(tables)), dtype=np.int64)
    for column, current in enumerate(tables):
        for row, request_id in enumerate(ids):
            for block in current.get(request_id, ()):
                held = codes[block - 1, column]
                codes[block - 1, column] = row + 1 if held == 0 else (held - 1) % len(ids) + 1 + len(ids)
    return codes


def _name_stretches(ax: Axes, grid: NDArray[np.int64], names: Sequence[str]) -> None:
    """Write the holder's name into each stretch of one colour that is wide enough for it."""
    per_letter = grid.shape[1] / 75  # columns per letter
    for row, codes in enumerate(grid):
        edges = [0, *(np.flatnonzero(np.diff(codes)) + 1), len(codes)]
        for start, end in pairwise(edges):
            name = names[codes[start] - 1] if 0 < codes[start] <= len(names) else ""
            if name and end - start > per_letter * (len(name) + 1):
                ax.text((start + end - 1) / 2, row, name, size=7.5, color=WHITE, weight="bold", ha="center",
                        va="center_baseline")  # fmt: skip


def _label_steps(ax: Axes, steps: Sequence[StepTrace]) -> None:
    shown = label_positions(len(steps), 20)
    ax.set_xticks(shown, [str(steps[i].step - steps[0].step) for i in shown])
    ax.set_xlabel("step")


# --- where memory is lost --------------------------------------------------------------------------------------


@styled
def memory_shares(shares: Mapping[str, Mapping[str, float]], *, title: str | None = None) -> Figure:
    """How the slots of memory are used, one stacked bar per policy: the shares of `fragmentation.Replay.shares`.

    A second panel shows the used shares that the vLLM paper measured, for another workload and other systems.
    """
    figure, (ours, paper) = new_figure(
        1.5 + 0.3 * (title is not None) + 0.42 * len(shares), 1, 2, title, width_ratios=(2, 1)
    )
    for row, parts in enumerate(shares.values()):
        left = 0.0
        for name in SHARES:
            _, color, hatch = SLOT_LOOKS[name]
            width = 100 * parts[name]
            ours.barh(row, width, 0.66, left=left, color=color, hatch=hatch, edgecolor=GREY, linewidth=0.5, label=name)
            if width >= 6:
                ours.text(left + width / 2, row, f"{width:.1f} %", ha="center", va="center", size=8, bbox=BEHIND)
            left += width
    ours.set_yticks(range(len(shares)), list(shares))
    ours.set_title("our replay")
    for row, (_, used) in enumerate(PAPER_FIG_2):
        paper.barh(row, used, 0.66, color=BLUE, alpha=0.45, edgecolor=GREY, linewidth=0.5, label="cited")
        place = min(used, 60)
        paper.annotate(f"{used} %", (place, row), (4, 0), textcoords="offset points", va="center", size=8, bbox=BEHIND)
    paper.set_yticks(range(len(PAPER_FIG_2)), [name for name, _ in PAPER_FIG_2])
    paper.set_title("cited")
    ours.set_xlabel("% of all slots, mean over busy steps", size=8.5)
    paper.set_xlabel("% used, on another workload:\nKwon et al. 2023, Fig. 2", size=8.5)
    for ax in (ours, paper):
        ax.set_xlim(0, 100)
        ax.set_ylim(len(ax.get_yticks()) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
    figure.legend(
        handles=[Patch(fc=color, hatch=hatch, ec=GREY, lw=0.5) for _, color, hatch in SLOT_LOOKS.values()],
        labels=[label for label, _, _ in SLOT_LOOKS.values()],
        loc="outside lower left",
        ncols=3,
    )
    return figure


@styled
def waste_by_block_size(
    sizes: Sequence[int], empty_slots: Sequence[float], empty_share: Sequence[float], *, title: str | None = None
) -> Figure:
    """What a block size B costs. Left: empty slots per running request, and the expected (B - 1) / 2.

    Right: the empty share of held slots in percent, over a logarithmic axis of B.
    """
    figure, (left, right) = new_figure(2.9, 1, 2, title)
    ends = [0, max(sizes)]
    left.plot(ends, [mean_empty_slots(size) for size in ends], "--", color=GREY, label="(B - 1) / 2")
    left.plot(sizes, empty_slots, linestyle="", marker=MARKERS[0], color=BLUE, label="replay")
    left.set_title("empty slots per running request")
    left.legend(loc="upper left")
    right.plot(sizes, [100 * share for share in empty_share], "-", color=VERMILLION, marker=MARKERS[1], label="empty")
    for size, share in zip(sizes, empty_share, strict=True):
        if size in (16, max(sizes)):
            right.annotate(f"{100 * share:.2g} %", (size, 100 * share), (-6, 4), textcoords="offset points", ha="right",
                           size=8.5)  # fmt: skip
    right.set_title("% of held slots that are empty")
    right.set_xscale("log", base=2)
    shown = [size for size in sizes if size & (size - 1) == 0]
    right.set_xticks(shown, [str(size) for size in shown])
    right.xaxis.set_minor_locator(NullLocator())
    for ax in (left, right):
        ax.set_xlabel("block size B, tokens")
        ax.set_xlim(left=0.9 if ax is right else 0)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    return figure


@styled
def slots_over_steps(
    arms: Mapping[str, Sequence[tuple[int, int]]], capacity: int, *, title: str | None = None
) -> Figure:
    """Held and written slots of memory step by step, one panel per arm on common axes.

    An arm is (held, written) per step. A dashed line marks the capacity. A panel's title says how many steps it took.
    """
    height = 0.85 + 0.3 * (title is not None) + 1.3 * len(arms)
    figure, axes = new_figure(height, len(arms), 1, title, sharex=True, sharey=True)
    for ax, (name, steps) in zip(axes, arms.items(), strict=True):
        edges = np.arange(len(steps) + 1) - 0.5
        held, written = np.asarray(steps, dtype=np.int64).T
        _, pale, hatch = SLOT_LOOKS["reserved"]
        ax.stairs(held, edges, fill=True, fc=pale, ec=GREY, hatch=hatch, lw=0.5, label="held and empty")
        ax.stairs(written, edges, fill=True, fc=SLOT_LOOKS["used"][1], label=SLOT_LOOKS["used"][0])
        ax.axhline(capacity, color=BLACK, ls="--", lw=1.2, label=f"{capacity:,} slots in all")
        ax.set(title=f"{name}: {len(steps)} steps", ylabel="slots", ylim=(0, 1.08 * capacity))
    axes[-1].set_xlim(-0.5, max(map(len, arms.values())) - 0.5)
    axes[-1].set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


# --- how tables share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableState:
    """A pool after one step."""

    blocks: BlockSnapshot
    texts: Mapping[str, Sequence[str]]  # request id -> a short text for each token with K/V
    copies: Sequence[tuple[int, int]] = ()  # (from, to) blocks


ROW = 2.3  # slots' widths from one row of blocks to the next


@styled
def block_tables(states: Mapping[str, TableState], *, title: str | None = None) -> Figure:
    """Block tables and the pool that they point into, one panel per state, below each other.

    The pool is the middle row. Under each block: its number and its reference count, in bold above 1. The first half
    of the requests is above the pool, the others below: one row of logical blocks each, with an arrow to the physical
    block. A dashed arrow is a copy. Texts of up to three letters fit where the pool has six blocks of four slots.
    """
    spans = [0.8 + ROW * len(state.texts) + 1.5 for state in states.values()]
    heights = [0.3 + 0.205 * span for span in spans]
    figure, axes = new_figure(0.3 * (title is not None) + sum(heights), len(states), 1, title, height_ratios=heights)
    for ax, (name, state), span in zip(axes, states.items(), spans, strict=True):
        ax.set_title(name)
        _draw_tables(ax, state)
        ax.set_ylim(span - 0.4, -0.4)
        ax.set_axis_off()
    return figure


def _draw_tables(ax: Axes, state: TableState) -> None:
    """One panel: the unit is a slot's width, and y grows downwards."""
    size, width = state.blocks.block_size, state.blocks.block_size + 1.0
    num_above = (len(state.texts) + 1) // 2
    pool_y = ROW * num_above
    contents: dict[int, list[str]] = {}
    for row, (request_id, texts) in enumerate(state.texts.items()):
        above, color = row < num_above, request_color(row)
        y = ROW * row if above else ROW * (row + 1) + 0.6
        ax.text(-0.6, y + 0.5, request_id, ha="right", va="center", size=8.5, color=color, weight="bold")
        for index, block in enumerate(state.blocks.tables.get(request_id, ())):
            own = list(texts[index * size : (index + 1) * size])
            contents[block] = max(contents.get(block, []), own, key=len)
            _draw_block(ax, index * width, y, size, own, color)
            ax.annotate(
                "", ((block - 1) * width + size / 2, pool_y + (not above)), (index * width + size / 2, y + above),
                arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
    ax.text(-0.6, pool_y + 0.5, "pool", ha="right", va="center", size=8.5, weight="bold")
    for block, count in enumerate(state.blocks.ref_cnt[1:], start=1):
        x, color = (block - 1) * width, BLACK if count > 1 else GREY
        _draw_block(ax, x, pool_y, size, contents.get(block, []), color, free=count == 0)
        ax.text(x + 0.1, pool_y + 1.42, str(block), ha="left", va="center", size=7.5, color=GREY)
        ax.text(
            x + size, pool_y + 1.42, f"ref {count}" if count else "free", ha="right", va="center", size=7.5,
            weight="bold" if count > 1 else "normal",
        )  # fmt: skip
    for source, target in state.copies:
        start, end = (source - 1) * width + size - 0.7, (target - 1) * width + 0.7
        ax.annotate(
            "", (end, pool_y), (start, pool_y),
            arrowprops={"arrowstyle": "-|>", "ls": "--", "color": BLACK, "connectionstyle": "arc3,rad=-0.45"},
        )  # fmt: skip
        ax.text((start + end) / 2, pool_y - 1.0, "copy", ha="center", va="center", size=7.5)
    ax.set_xlim(-3.0, (len(state.blocks.ref_cnt) - 1) * width - 0.6)


def _draw_block(ax: Axes, x: float, y: float, size: int, texts: Sequence[str], edge: str, free: bool = False) -> None:
    """A block of `size` slots with its upper left corner at (x, y); written slots are yellow and carry their text."""
    for slot in range(size):
        written = slot < len(texts)
        ax.add_patch(Rectangle((x + slot, y), 1, 1, fc=YELLOW if written else WHITE, ec=PALE, lw=0.6))
        if written:
            ax.text(x + slot + 0.5, y + 0.5, texts[slot], ha="center", va="center", size=7.5)
    ax.add_patch(
        Rectangle((x, y), size, 1, fill=False, ec=GREY if free else edge, lw=0.8 if free else 1.6,
                  ls=":" if free else "-")
    )  # fmt: skip


# --- preemption ------------------------------------------------------------------------------------------------


@styled
def preemption_timeline(
    traces: Mapping[str, Iterable[StepTrace]],
    request_ids: Sequence[str],
    *,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Figure:
    """Running and preempted requests in each step: one panel per trace on one axis of steps, a row per request.

    In addition to the cells of `timeline.request_gantt`: a cross on red while a preempted request's K/V is dropped, a
    stroke on purple while it is on the host, and a plus in a step that recomputes it. The traces need snapshots.
    """
    runs = {name: list(trace) for name, trace in traces.items()}
    longest = max(map(len, runs.values()))
    heights = [0.35 + 0.27 * len(request_ids)] * len(runs)
    figure, axes = new_figure(1.25 + 0.3 * (title is not None) + sum(heights), len(runs), 1, title, sharex=True)
    kinds = (AWAY, WAITING, PREFILL, DECODE, DROPPED, ON_HOST, AGAIN)
    met = set()
    for ax, (name, steps) in zip(axes, runs.items(), strict=True):
        codes = np.zeros((len(request_ids), longest), dtype=np.int64)
        for row, request_id in enumerate(request_ids):
            codes[row, : len(steps)] = [kinds.index(kind) for kind in lives_with_preemption(steps, request_id)]
        met |= set(codes.ravel().tolist())
        draw_cells(ax, codes, kinds, mark_size=9)
        times = sum(len(step.preempted) for step in steps)
        ax.set_title(f"{name}: {len(steps)} steps, preempted {times} time{'s' * (times != 1)}")
        ax.set_yticks(range(len(request_ids)), [(labels or {}).get(i, i) for i in request_ids])
        ax.tick_params(labelbottom=ax is axes[-1])
    _label_steps(axes[-1], max(runs.values(), key=len))
    legend_of_kinds(figure, [kind for code, kind in enumerate(kinds) if code and code in met], columns=3)
    return figure


def lives_with_preemption(steps: Sequence[StepTrace], request_id: str) -> list[Kind]:
    """What a request does in each step. Raises ValueError for a trace without snapshots."""
    snapshots = snapshots_of(steps)
    last = max((i for i, s in enumerate(steps) if any(r.request_id == request_id for r in s.requests)), default=-1)
    kinds: list[Kind] = []
    gone: Kind | None = None  # where its K/V is while it is preempted
    catching_up = False
    for index, (step, blocks) in enumerate(zip(steps, snapshots, strict=True)):
        share = next((r for r in step.requests if r.request_id == request_id), None)
        if share is not None:
            catching_up = catching_up or gone is DROPPED
            kinds.append(AGAIN if catching_up else PREFILL if share.num_prompt else DECODE)
            catching_up = catching_up and share.num_sampled == 0  # the next step recomputes the rest
            gone = None
        elif index > last:
            kinds.append(AWAY)
        else:
            if request_id in step.preempted:
                gone, catching_up = DROPPED, False
            if gone is not None:
                gone = ON_HOST if request_id in blocks.host_tables else DROPPED
            kinds.append(gone or WAITING)
    return kinds
