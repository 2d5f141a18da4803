"""The prefix cache: the tree of block hashes, the hit rate, and the eviction order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from folovllm.course.viz.blocks import request_color, snapshots_of
from folovllm.course.viz.style import (
    BLACK,
    DASHES,
    GREY,
    MARKERS,
    PALE,
    SERIES,
    WHITE,
    YELLOW,
    Kind,
    draw_cells,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)
from folovllm.engine.trace import StepTrace
from folovllm.kv_cache.interface import BlockSnapshot

HELD = Kind("held by a running request", PALE, "_", GREY)
EMPTY = Kind("free, nothing cached", WHITE)


def hit_tokens(shared: int, prompt_len: int, block_size: int) -> int:
    """Prompt tokens that hit the cache if the cache holds prompts with the same first `shared` tokens.

    Full blocks only, and never the whole prompt: its last token must be computed for its logits.
    """
    return min(shared, prompt_len - 1) // block_size * block_size


# --- the tree of block hashes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeBox:
    """A node of the tree: a block, or tokens without a key."""

    parent: int | None  # the block before it
    text: str
    caption: str
    has_key: bool
    is_shared: bool


Node = int | str | None  # a block, the request whose tokens have no key, or the root


@styled
def hash_tree(
    snapshot: BlockSnapshot,
    texts: Mapping[int, str],
    tails: Mapping[str, str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """The blocks of a prefix cache as a tree: a box per block, a line from its parent block.

    texts: block -> text of its tokens. Under each box: the block's number and its reference count, in bold above 1.
    tails: request -> the tokens after its last full block, which have no hash: a dotted box named after the request,
    behind the last full block of its table. Depth grows to the right, from the secret that every first hash includes.
    """
    boxes: dict[int | str, TreeBox] = {}
    for block, parent in sorted(snapshot.cached.items()):
        count = snapshot.ref_cnt[block]
        caption = f"block {block}, " + (f"ref {count}" if count else "free")
        boxes[block] = TreeBox(parent, texts.get(block, ""), caption, True, count > 1)
    for request_id, text in (tails or {}).items():
        full = [block for block in snapshot.tables.get(request_id, ()) if block in snapshot.cached]
        boxes[request_id] = TreeBox(full[-1] if full else None, text, f"{request_id}, no key", False, False)
    places, leaves, depth = _lay_out(boxes)
    figure, (ax,) = new_figure(0.35 + 0.3 * (title is not None) + 0.56 * leaves, title=title)
    ax.text(0, places[None][1], "secret", ha="left", va="center", size=8.5, style="italic", color=GREY)
    for node, box in boxes.items():
        left, row = places[node][0] - 0.6, places[node][1]
        start, level = (0.28, places[None][1]) if box.parent is None else places[box.parent]
        if box.parent is not None:
            start += BOX_WIDTH - 0.6
        bend = left - 0.07
        ax.plot([start, bend, bend, left], [level, level, row, row], color=GREY, lw=1.2, label="chain", zorder=1)
        ax.add_patch(
            Rectangle((left, row - 0.26), BOX_WIDTH, 0.52, zorder=2, fc=YELLOW if box.has_key else WHITE,
                      ec=BLACK if box.has_key else GREY, ls="-" if box.has_key else ":")
        )  # fmt: skip
        middle, weight = left + BOX_WIDTH / 2, "bold" if box.is_shared else "normal"
        ax.text(middle, row, box.text, ha="center", va="center", size=8, zorder=3)
        ax.text(middle, row + 0.4, box.caption, ha="center", va="center", size=7.5, weight=weight)
    ax.set_xlim(-0.02, depth - 0.58 + BOX_WIDTH)
    ax.set_ylim(leaves - 0.35, -0.45)
    ax.set_axis_off()
    return figure


BOX_WIDTH = 0.84  # of the distance from one block to the next


def _lay_out(boxes: Mapping[int | str, TreeBox]) -> tuple[dict[Node, tuple[int, float]], int, int]:
    """(column, row) of each node. Each leaf has a row of its own; a parent is centred on its children."""
    children: dict[Node, list[int | str]] = {}
    for name, box in boxes.items():
        children.setdefault(box.parent, []).append(name)
    places: dict[Node, tuple[int, float]] = {}
    leaves, deepest = 0, 0

    def place(node: Node, column: int) -> float:
        nonlocal leaves, deepest
        deepest = max(deepest, column)
        rows = [place(child, column + 1) for child in children.get(node, ())]
        if rows:
            row = (rows[0] + rows[-1]) / 2
        else:
            row, leaves = float(leaves), leaves + 1
        places[node] = (column, row)
        return row

    place(None, 0)
    return places, leaves, deepest


# --- hit rate ----------------------------------------------------------------------------------------------------


@styled
def hit_rate_by_prefix(
    shared: Sequence[int],
    rates: Mapping[int, Sequence[float]],
    prompt_len: int,
    num_requests: int,
    *,
    title: str | None = None,
) -> Figure:
    """The hit rate of prompt tokens over the length of the shared prefix.

    rates: block size -> measured rate per length in `shared`, drawn as markers. The lines are the formula `hit_tokens`
    for `num_requests` prompts of `prompt_len` tokens, of which all but the first hit the prefix. The dotted line is the
    upper bound, blocks of one token.
    """
    figure, (ax,) = new_figure(3.3 + 0.3 * (title is not None), title=title)
    every = np.arange(prompt_len + 1)

    def formula(size: int) -> NDArray[np.float64]:
        found = np.array([hit_tokens(length, prompt_len, size) for length in range(prompt_len + 1)])
        return 100 * (num_requests - 1) * found / (num_requests * prompt_len)

    ax.plot(every, formula(1), ls=":", color=GREY, lw=1.4, label="every shared token")
    for i, (size, measured) in enumerate(rates.items()):
        ax.plot(every, formula(size), ls=DASHES[i], color=SERIES[i], lw=1.2, label="_formula")
        ax.plot(shared, [100 * rate for rate in measured], ls="", marker=MARKERS[i], color=SERIES[i],
                label=f"blocks of {size}")  # fmt: skip
    ax.set_xlabel(f"shared prefix of {num_requests} prompts of {prompt_len} tokens, in tokens")
    ax.set_ylabel("hit rate, % of all prompt tokens")
    ax.set_xlim(0, prompt_len + 1)
    ax.set_ylim(0, 100)
    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 4, 8, 10]))
    ax.grid(axis="y")
    ax.legend(loc="upper left")
    return figure


# --- eviction order -------------------------------------------------------------------------------------------------


@styled
def lru_order(
    trace: Iterable[StepTrace], *, labels: Mapping[str, str] | None = None, title: str | None = None
) -> Figure:
    """The free queue over time: a column per step, with the block that is taken next at its top.

    A cell is a block, in the colour of the request that filled it, with that request's id and the block's index from 0:
    "a2" is the third block of a. White: free, nothing cached. Grey, below the queue: held. A triangle marks a step that
    evicted cached blocks, and names them. labels: other names for requests. The trace needs snapshots
    (`trace_blocks=True`).
    """
    steps = list(trace)
    snapshots = snapshots_of(steps)
    ids = list(dict.fromkeys(i for snap in snapshots for i in snap.tables))
    fillers = block_fillers(steps)
    names = [{b: f"{(labels or {}).get(i, i)}{n}" for b, (i, n) in step.items()} for step in fillers]
    kinds = [EMPTY, *(Kind((labels or {}).get(i, i), request_color(row)) for row, i in enumerate(ids)), HELD]
    num_blocks = len(snapshots[0].ref_cnt) - 1
    codes = np.full((num_blocks, len(steps)), len(kinds) - 1, dtype=np.int64)
    figure, (ax,) = new_figure(1.35 + 0.3 * (title is not None) + 0.24 * num_blocks, title=title)
    for column, snap in enumerate(snapshots):
        for place, block in enumerate(snap.free):
            filler = fillers[column].get(block)
            codes[place, column] = 1 + ids.index(filler[0]) if block in snap.cached and filler else 0
    draw_cells(ax, codes, kinds, mark_size=9)
    for column, snap in enumerate(snapshots):
        for place, block in enumerate(snap.free):
            if codes[place, column]:
                ax.text(column, place, names[column][block], size=7.5, color=WHITE, weight="bold", ha="center",
                        va="center_baseline")  # fmt: skip
    for column, blocks in enumerate(lost_blocks(steps)):
        if blocks:
            ax.scatter([column], [-0.9], s=22, marker="v", color=BLACK, clip_on=False, label="evicted")
            text = "\n".join(names[column - 1].get(block, "?") for block in blocks)
            ax.annotate(text, (column, -0.9), (0, 5), textcoords="offset points", ha="center", size=7.5,
                        annotation_clip=False)  # fmt: skip
    shown = label_positions(len(steps), 24)
    ax.set_xticks(shown, [str(steps[i].step - steps[0].step) for i in shown])
    ax.set_yticks(range(0, num_blocks, max(1, num_blocks // 6)))
    ax.set_xlabel("step")
    ax.set_ylabel("position in the free queue")
    legend_of_kinds(figure, [*kinds[1:], EMPTY], columns=min(7, len(kinds)))
    return figure


def block_fillers(steps: Iterable[StepTrace]) -> list[dict[int, tuple[str, int]]]:
    """After each step: block -> the request that filled it, and the block's index in that request.

    A prefix hit or a fork does not change it. Raises ValueError for a trace without snapshots.
    """
    steps = list(steps)
    found: list[dict[int, tuple[str, int]]] = []
    current: dict[int, tuple[str, int]] = {}
    before: dict[int, set[str]] = {}  # block -> its holders after the step before
    for step, snap in zip(steps, snapshots_of(steps), strict=True):
        start = {r.request_id: r.num_computed - r.num_scheduled for r in step.requests}
        holders: dict[int, set[str]] = {}
        for request_id, table in snap.tables.items():
            for index, block in enumerate(table):
                holders.setdefault(block, set()).add(request_id)
                is_hit = (index + 1) * snap.block_size <= start.get(request_id, 0)
                if not (before.get(block, set()) & holders[block] or (is_hit and block in current)):
                    current[block] = (request_id, index)
        found.append(dict(current))
        before = holders
    return found


def lost_blocks(steps: Sequence[StepTrace]) -> list[list[int]]:
    """Per step: the free cached blocks that it evicted, in the order of the free queue.

    Raises ValueError for a trace without snapshots.
    """
    snapshots, fillers = snapshots_of(steps), block_fillers(steps)
    lost: list[list[int]] = [[]]
    for i, (before, after) in enumerate(pairwise(snapshots)):
        lost.append(
            [
                block
                for block in before.free
                if block in before.cached
                and (block not in after.cached or fillers[i].get(block) != fillers[i + 1].get(block))
            ]
        )
    return lost
