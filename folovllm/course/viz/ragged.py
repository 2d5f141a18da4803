"""Ragged batches: the mask, the slots of K/V, the tiles that a kernel loads, and online softmax tile by tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray

from folovllm.attention.reference import visible_tokens
from folovllm.course.lessons.online_softmax import SoftmaxState
from folovllm.course.viz.blocks import request_color
from folovllm.course.viz.padding import PADDING, batch_rectangle
from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    SKY,
    VERMILLION,
    WHITE,
    Kind,
    draw_cells,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)
from folovllm.math_utils import cdiv

HIDDEN = Kind("masked", WHITE)
UNREAD, MASKED, WHOLE = Kind("never loaded", WHITE), Kind("loaded, with a mask", ORANGE), Kind("loaded, no mask", SKY)
UNSEEN = "masked pair"


def request_kinds(names: Sequence[str], what: str = "") -> list[Kind]:
    """A kind of cell for each request, with its own colour and mark."""
    return [Kind(f"{what}{n}", request_color(i), MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)]


def check_lengths(query_lens: Sequence[int], kv_lens: Sequence[int], names: Sequence[str]) -> None:
    """Raises ValueError unless each request has a name and 1 <= query_len <= kv_len."""
    fits = len(query_lens) == len(kv_lens) == len(names) > 0
    if not fits or any(not 1 <= new <= length for new, length in zip(query_lens, kv_lens, strict=True)):
        raise ValueError(
            f"query_lens={list(query_lens)}, kv_lens={list(kv_lens)}, names={list(names)} are not valid; allowed: one "
            "of each per request, with 1 <= query_len <= kv_len"
        )


# --- the mask --------------------------------------------------------------------------------------------------


def ragged_codes(query_lens: Sequence[int], kv_lens: Sequence[int]) -> NDArray[np.int64]:
    """The mask, [T, S] with S = sum(kv_lens): r + 1 where a new token of request r sees a key of r, else 0."""
    codes = np.zeros((sum(query_lens), sum(kv_lens)), dtype=np.int64)
    row = column = 0
    for request, (new, length) in enumerate(zip(query_lens, kv_lens, strict=True)):
        visible = visible_tokens(new, length, None).numpy()
        codes[row : row + new, column : column + length] = np.where(visible, request + 1, 0)
        row, column = row + new, column + length
    return codes


@styled
def ragged_masks(
    steps: Mapping[str, tuple[Sequence[int], Sequence[int]]], names: Sequence[str], *, title: str | None = None
) -> Figure:
    """The masks of steps, each (query_lens, kv_lens): rows are new tokens, columns the keys of all requests.

    A cell in a request's colour, with its mark, is True. Lines separate requests. Rows and columns are labelled where a
    request begins; for the rows that is query_start_loc.
    """
    for query_lens, kv_lens in steps.values():
        check_lengths(query_lens, kv_lens, names)
    kinds = [HIDDEN, *request_kinds(names, "within ")]
    widths = [sum(kv_lens) for _, kv_lens in steps.values()]
    tallest = max(sum(query_lens) for query_lens, _ in steps.values())
    figure, axes = new_figure(
        1.35 + 0.3 * (title is not None) + min(0.24 * tallest, 3.2), 1, len(steps), title, width_ratios=widths
    )
    for ax, (name, (query_lens, kv_lens)) in zip(axes, steps.items(), strict=True):
        draw_cells(ax, ragged_codes(query_lens, kv_lens), kinds, mark_size=9 if max(widths) <= 24 else 4)
        starts, columns = [0, *accumulate(query_lens)], [0, *accumulate(kv_lens)]
        for start in starts[1:-1]:
            ax.axhline(start - 0.5, color=BLACK, linewidth=1.2)
        for column in columns[1:-1]:
            ax.axvline(column - 0.5, color=BLACK, linewidth=1.2)
        ax.set_yticks([start - 0.5 for start in starts], [str(start) for start in starts])
        ax.set_xticks([column - 0.5 for column in columns], [str(column) for column in columns])
        ax.set_title(name)
        ax.set_xlabel("keys of all requests")
    axes[0].set_ylabel("new tokens\n(labels: query_start_loc)")
    legend_of_kinds(figure, [*kinds[1:], HIDDEN])
    return figure


# --- padded and ragged -----------------------------------------------------------------------------------------


@styled
def padded_and_ragged(lengths: Sequence[int], names: Sequence[str], *, title: str | None = None) -> Figure:
    """The same texts as a left-padded rectangle and as one ragged row, on one scale."""
    check_lengths(lengths, lengths, names)
    kinds = [PADDING, *request_kinds(names)]
    longest, starts = max(lengths), [0, *accumulate(lengths)]
    padded = batch_rectangle(lengths)  # [B, L]: 0 a token, 1 padding
    rectangle = np.where(padded == 1, 0, np.arange(1, len(lengths) + 1)[:, None])  # [B, L]
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]  # [1, T]
    height = 0.22 * len(lengths)
    figure, (above, below) = new_figure(
        1.25 + 0.3 * (title is not None) + height + 0.22, 2, 1, title, sharex=True, height_ratios=(0.35 + height, 0.57)
    )
    for ax, grid in ((above, rectangle), (below, row)):
        draw_cells(ax, grid, kinds, mark_size=0)
        ax.grid(False, which="minor")
        ax.spines[:].set(visible=False)
        ax.set_xlim(-0.5, max(row.size, longest) - 0.5)

    def name(ax: Axes, text: str, start: float, end: float, row: int, ink: str) -> None:
        ax.text((start + end - 1) / 2, row, text, color=ink, weight="bold", size=8, ha="center", va="center_baseline")

    for request, length in enumerate(lengths):
        name(above, names[request], longest - length, longest, request, WHITE)
        name(below, names[request], starts[request], starts[request + 1], 0, WHITE)
        if longest - length > row.size / 12:
            name(above, "padding", 0, longest - length, request, GREY)
    above.set_title(f"padded [{len(lengths)}, {longest}]: {rectangle.size} cells, {1 - row.size / rectangle.size:.1%} "
                    "padding")  # fmt: skip
    below.set_title(f"ragged [{row.size}]: {row.size} tokens")
    above.set_yticks([])
    below.set_yticks([])
    below.set_xticks([start - 0.5 for start in starts], [str(start) for start in starts])
    below.set_xlabel("labels: query_start_loc")
    return figure


# --- where K/V goes --------------------------------------------------------------------------------------------


@styled
def slot_arrows(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    slot_mapping: Sequence[int],
    block_table: Sequence[Sequence[int]],
    block_size: int,
    num_blocks: int,
    names: Sequence[str],
    *,
    title: str | None = None,
) -> Figure:
    """One step: its tokens in a row, the pool below, and an arrow from each token to the slot of its K/V.

    A token's cell holds its position. In the pool, blocks are framed and numbered from 0, the null block; a slot has
    its request's colour if this step writes it, and a letter if an earlier step did. num_blocks: blocks of the pool,
    the null block included.
    """
    query_lens = [end - start for start, end in pairwise(query_start_loc)]
    check_lengths(query_lens, seq_lens, names)
    tokens, slots = query_start_loc[-1], num_blocks * block_size
    figure, (ax,) = new_figure(3.0 + 0.3 * (title is not None), 1, 1, title)
    ax.set_axis_off()
    ax.set_xlim(-0.5, slots - 0.5)
    ax.set_ylim(4.6, -1.15)
    left = (slots - tokens) / 2

    def cell(x: float, y: float, face: str, text: str, ink: str = WHITE) -> None:
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor=GREY, linewidth=0.6))
        ax.text(x, y, text, ha="center", va="center_baseline", color=ink, size=8)

    for slot in range(slots):
        cell(slot, 3.4, WHITE, "")
    for request, (new, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        color, start = request_color(request), query_start_loc[request]
        for position in range(length - new):
            slot = block_table[request][position // block_size] * block_size + position % block_size
            cell(slot, 3.4, PALE, names[request], BLACK)
        for row in range(start, start + new):
            position, slot = length - new + row - start, slot_mapping[row]
            cell(left + row, 0, color, str(position))
            cell(slot, 3.4, color, str(position))
            arrow = ConnectionPatch((left + row, 0.5), (slot, 2.9), "data", "data", axesA=ax, arrowstyle="-|>",
                                    color=color, linewidth=1, shrinkA=0, shrinkB=0, mutation_scale=7)  # fmt: skip
            arrow.set_label(f"{row} to {slot}")
            ax.add_patch(arrow)
        ax.text(left + start + (new - 1) / 2, -0.72, names[request], ha="center", weight="bold", color=color)
    for block in range(num_blocks):
        corner = (block * block_size - 0.5, 2.9)
        ax.add_patch(Rectangle(corner, block_size, 1, facecolor="none", edgecolor=BLACK, linewidth=1.5))
        name = "null block" if block == 0 else f"block {block}"
        ax.text((block + 0.5) * block_size - 0.5, 4.35, name, ha="center", size=8)
    ax.text(left - 0.8, 0, "positions of the\nstep's tokens", ha="right", va="center", size=8)
    ax.text(left + tokens - 0.2, 0, "a letter: K/V of\nan earlier step", ha="left", va="center", size=8)
    return figure


# --- which tiles a kernel loads --------------------------------------------------------------------------------


def tile_kinds(query_len: int, kv_len: int, block_q: int, tile: int) -> NDArray[np.int64]:
    """How `attention_kernel` loads each tile, [blocks of queries, tiles]: 0 not loaded, 1 with a mask, 2 without.

    block_q: tokens per block of queries. One segment and no sliding window.
    """
    past = kv_len - query_len
    kinds = np.zeros((cdiv(query_len, block_q), cdiv(kv_len, tile)), dtype=np.int64)
    for block, first in enumerate(range(0, query_len, block_q)):
        last = min(past + first + block_q, kv_len)  # no query of the block sees a key from here on
        whole = min(past + first + 1, last) // tile  # all queries of the block see all keys of these tiles
        kinds[block, : cdiv(last, tile)] = 1
        kinds[block, :whole] = 2
    return kinds


@styled
def kernel_tiles(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_q: int,
    tile: int,
    names: Sequence[str],
    *,
    title: str | None = None,
) -> Figure:
    """Every request's queries and keys in the tiles of the Triton kernel: a row of tiles is the work of one program.

    A tile is loaded without a mask, loaded with a mask, or never loaded. A cross is a masked pair.
    """
    check_lengths(query_lens, kv_lens, names)
    figure, axes = new_figure(
        1.3 + 0.3 * (title is not None) + 0.1 * max(query_lens), 1, len(names), title, width_ratios=list(kv_lens)
    )
    for ax, name, new, length in zip(axes, names, query_lens, kv_lens, strict=True):
        kinds = tile_kinds(new, length, block_q, tile)
        codes = np.kron(kinds, np.ones((block_q, tile), dtype=np.int64))[:new, :length]  # [L, S]
        draw_cells(ax, codes, (UNREAD, MASKED, WHOLE))
        crossed = np.argwhere((codes > 0) & ~visible_tokens(new, length, None).numpy())
        ax.scatter(crossed[:, 1], crossed[:, 0], s=9, marker="x", color=BLACK, lw=0.7, label=UNSEEN)
        for column in range(tile, length, tile):
            ax.axvline(column - 0.5, color=BLACK, linewidth=1.2)
        for row in range(block_q, new, block_q):
            ax.axhline(row - 0.5, color=BLACK, linewidth=1.2)
        ax.set_box_aspect(min(1.0, (new + 0.5) / max(8, length)))
        ax.set_title(f"{name}: {new} new of {length}", size=9)
        ax.set_xticks([0, *range(tile, length, tile)])
        ax.set_yticks(label_positions(new, 8))
        ax.set_xlabel("key")
    axes[0].set_ylabel("new token")
    legend_of_kinds(figure, (WHOLE, MASKED, Kind(UNSEEN, ORANGE, "x", BLACK), UNREAD), columns=4)
    return figure


# --- online softmax --------------------------------------------------------------------------------------------


@styled
def online_softmax_steps(
    scores: Sequence[float],
    tile: int,
    states: Sequence[SoftmaxState],
    without_rescale: Sequence[SoftmaxState],
    exact: float,
    *,
    title: str | None = None,
) -> Figure:
    """One row of scores, tile by tile: the running maximum, the running sum, and element 0 of the attention so far.

    The dotted lines are the results over all keys at once: `exact`, and the sum of e^(score - maximum).
    `without_rescale` is the control arm.
    """
    row = np.asarray(scores, dtype=np.float64)  # [S]
    ends = [min(end, len(row)) for end in range(tile, len(row) + tile, tile)]
    if not len(states) == len(without_rescale) == len(ends):
        raise ValueError(
            f"states={len(states)}, without_rescale={len(without_rescale)} are not valid; allowed: {len(ends)} of "
            f"each, one per tile of {tile} in {len(row)} scores"
        )
    exact_total = float(np.exp(row - row.max()).sum())
    figure, (top, middle, bottom) = new_figure(4.9 + 0.3 * (title is not None), 3, 1, title, sharex=True)
    top.bar(range(len(row)), row, 0.8, color=SKY, edgecolor=WHITE, label="score")
    edges = [-0.5, *(end - 0.5 for end in ends)]
    top.stairs([s.maximum for s in states], edges, baseline=None, color=BLACK, linewidth=1.8, label="maximum so far")
    for before, state in zip(ends, states[1:], strict=False):
        if state.rescale < 1:
            top.annotate(f"rescale x {state.rescale:.3f}", (before - 0.5, state.maximum), (4, 3), fontsize=8,
                         textcoords="offset points")  # fmt: skip
    arms = (("with the rescale", states, BLUE, "o", "-"), ("without it", without_rescale, VERMILLION, "s", "--"))
    centres = [(start + end) / 2 for start, end in pairwise(edges)]
    for label, arm, color, marker, dash in arms:
        look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": dash, "label": label}
        middle.plot(centres, [s.total for s in arm], **look)
        bottom.plot(centres, [float(s.attention[0]) for s in arm], **look)
    for ax, number in ((middle, exact_total), (bottom, exact)):
        ax.axhline(number, color=BLACK, linestyle=":", linewidth=1.2, label="all keys at once")
    for ax in (top, middle, bottom):
        for edge in edges[1:-1]:
            ax.axvline(edge, color=GREY, linewidth=0.8)
    low, high = top.get_ylim()
    top.set_ylim(low, high + 0.25 * (high - low))  # for the labels
    top.set_ylabel("score")
    middle.set_ylabel("sum")
    bottom.set_ylabel("attention so far")
    bottom.set_xlabel("key")
    bottom.set_xlim(-0.5, len(row) - 0.5)
    bottom.set_xticks(label_positions(len(row), 20))
    handles = [pair for ax in (top, middle) for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*handles, strict=True), loc="outside lower left", ncols=5, columnspacing=1.2)
    return figure
