"""Padding: which cells of a batch are padding, their share, and how it grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from folovllm.course.viz.style import (
    BLACK,
    DASHES,
    GREY,
    MARKERS,
    PALE,
    SERIES,
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
from folovllm.engine.trace import StepTrace

NEEDED = Kind("token of a running request", SKY)
PADDING = Kind("padding", PALE, "x", GREY)
DONE = Kind("of a finished request", VERMILLION, ".", BLACK)


def batch_rectangle(
    prompt_lens: Sequence[int], max_tokens: Sequence[int] | None = None, fed: int = 0
) -> NDArray[np.int64]:
    """The cells [B, L + fed] that a static, left-padded batch holds in its `fed`-th decode step; 0 is the prefill.

    L is the longest prompt. A cell is 0 for a token of a running request, 1 for padding, 2 for any cell of a finished
    request. max_tokens: output tokens per request, the last of which is never fed; not needed for the prefill.
    """
    longest = max(prompt_lens)
    codes = np.zeros((len(prompt_lens), longest + fed), dtype=np.int64)  # [B, L + fed]
    for row, prompt_len in enumerate(prompt_lens):
        codes[row, : longest - prompt_len] = 1
        if max_tokens is not None and fed >= max_tokens[row]:
            codes[row, longest - prompt_len :] = 2
    return codes


@styled
def padding_map(rectangles: Mapping[str, ArrayLike], *, title: str | None = None) -> Figure:
    """Rectangles of cells as the model gets them, below each other: a row per request, a column per position.

    A rectangle holds 0 for a needed token, 1 for padding, and 2 for a cell of a finished request, as from
    `batch_rectangle`. Its title counts the needed cells and gives the shares of the others.
    """
    grids = {name: np.asarray(codes, dtype=np.int64) for name, codes in rectangles.items()}
    heights = [0.62 + 0.17 * len(grid) for grid in grids.values()]
    figure, axes = new_figure(0.45 + 0.3 * (title is not None) + sum(heights), len(grids), 1, title,
                              height_ratios=heights)  # fmt: skip
    for ax, (name, grid) in zip(axes, grids.items(), strict=True):
        draw_cells(ax, grid, (NEEDED, PADDING, DONE), mark_size=5 if grid.shape[1] > 40 else 14)
        needed, padding, done = np.bincount(grid.ravel(), minlength=3)
        note = f", {done / grid.size:.1%} of finished requests" if done else ""
        ax.set_title(f"{name}: {needed} of {grid.size} cells needed, {padding / grid.size:.1%} padding{note}")
        ax.set_xticks(label_positions(grid.shape[1], 20))
        ax.set_yticks(range(len(grid)))
        ax.set_ylabel("request")
    axes[-1].set_xlabel("column of the batch")
    legend_of_kinds(figure, (NEEDED, PADDING, DONE)[: 1 + max(int(grid.max()) for grid in grids.values())])
    return figure


def kv_cells_of_trace(trace: Iterable[StepTrace]) -> NDArray[np.int64]:
    """Columns of K/V in each step's batches, [steps, 3]: of requests, of padding, of finished requests (always 0)."""
    return np.array([[sum(r.num_computed for r in s.requests), s.padding_kv_tokens, 0] for s in trace])


def kv_cells_of_static(prompt_lens: Sequence[int], max_tokens: Sequence[int], batch_size: int) -> NDArray[np.int64]:
    """The same for static batches in the order of the requests: one row per forward, from `batch_rectangle`."""
    counts = []
    for first in range(0, len(prompt_lens), batch_size):
        lens, most = prompt_lens[first : first + batch_size], max_tokens[first : first + batch_size]
        cells = (batch_rectangle(lens, most, fed) for fed in range(max(most)))
        counts += [np.bincount(codes.ravel(), minlength=3) for codes in cells]
    return np.array(counts)


@styled
def padding_over_steps(arms: Mapping[str, ArrayLike], *, title: str | None = None) -> Figure:
    """K/V cells in the batch, step by step, one panel per arm, as stacked bars on common axes.

    An arm is [steps, 3]: cells of running requests, of padding, and of finished requests. A panel's title says how many
    steps it took and which share of the cells, summed over all steps, is wasted.
    """
    counts = {name: np.asarray(cells, dtype=np.int64) for name, cells in arms.items()}
    figure, axes = new_figure(0.85 + 0.3 * (title is not None) + 1.45 * len(counts), len(counts), 1, title,
                              sharex=True, sharey=True)  # fmt: skip
    for ax, (name, cells) in zip(axes, counts.items(), strict=True):
        below = np.zeros(len(cells))
        for column, (kind, hatch) in enumerate(zip((NEEDED, PADDING, DONE), ("", "xxxx", "...."), strict=True)):
            ax.bar(range(len(cells)), cells[:, column], 1.0, bottom=below, color=kind.color, hatch=hatch,
                   edgecolor=GREY if column == 1 else WHITE, linewidth=0.3, label=kind.label)  # fmt: skip
            below = below + cells[:, column]
        waste = 1 - cells[:, 0].sum() / cells.sum()
        ax.set_title(f"{name}: {len(cells)} steps, {waste:.0%} of all cells are wasted")
        ax.set_ylabel("K/V cells")
        ax.grid(axis="y")
    axes[-1].set_ylim(0, 1.05 * max(cells.sum(axis=1).max() for cells in counts.values()))
    axes[-1].set_xlim(-0.5, max(map(len, counts.values())) - 0.5)
    axes[-1].set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


@styled
def padding_growth(rows: Sequence[int], lengths: Sequence[int], *, title: str | None = None) -> Figure:
    """Padding of a batch of one prompt of n tokens and B - 1 prompts of one token: (n - 1)(B - 1) cells.

    Left: over B = `rows`, a line per n; right: over n = `lengths`, a line per B. All lines are straight.
    """
    figure, (left, right) = new_figure(2.9, 1, 2, title, sharey=True)
    for ax, over, lines, name, label in (
        (left, rows, lengths, "n", "rows in the batch, B"),
        (right, lengths, rows, "B", "tokens in the long prompt, n"),
    ):
        x = np.array([1, *over])
        for i, fixed in enumerate(lines):
            ax.plot(
                x, (fixed - 1) * (x - 1), linestyle=DASHES[i], color=SERIES[i], marker=MARKERS[i], markersize=4,
                label=f"{name} = {fixed}",
            )  # fmt: skip
        ax.set_xlabel(label)
        ax.set_xticks(x)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
        ax.legend(loc="upper left")
    left.set_ylabel("padding cells")
    return figure
