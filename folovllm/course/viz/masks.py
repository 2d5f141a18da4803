"""Attention masks, and the position ids of a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREY,
    PALE,
    SKY,
    WHITE,
    Kind,
    draw_cells,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)
from folovllm.math_utils import cdiv

SEEN, HIDDEN = Kind("visible to the query", BLUE, "o"), Kind("masked", WHITE)
TOKEN, PAD = Kind("a token and its position id", SKY), Kind("padding, masked out", PALE, "x", GREY)


@styled
def attention_masks(
    masks: Mapping[str, ArrayLike], tokens: Sequence[str] | None = None, *, columns: int = 3, title: str | None = None
) -> Figure:
    """Boolean masks [Lq, Lk] side by side, each under its name: query i is row i, from the top; key j is column j.

    A blue cell with a dot is True: the query may attend to the key. `tokens` [Lk] label the keys; the queries are the
    last Lq of them (the rows of a decode step or a chunk). columns: masks per row of the figure.
    """
    grids = {name: np.asarray(mask, dtype=bool) for name, mask in masks.items()}
    wrong = [f"{name} {list(grid.shape)}" for name, grid in grids.items() if grid.ndim != 2]
    if not grids or wrong:
        raise ValueError(f"masks={wrong or 'none'}: at least one is needed, each [queries, keys]")
    columns = min(columns, len(grids))
    rows = cdiv(len(grids), columns)
    tallest = max(grid.shape[0] for grid in grids.values())
    panel = 0.95 + min(0.29 * tallest, 6.0 / columns)
    figure, axes = new_figure(0.6 + rows * panel, rows, columns, title)
    for index, (ax, (name, grid)) in enumerate(zip(axes, grids.items(), strict=False)):
        draw_cells(ax, grid, (HIDDEN, SEEN), mark_size=14 if tallest <= 16 else 4)
        queries, keys = grid.shape
        labels = [str(j) for j in range(keys)] if tokens is None else list(tokens)[:keys]
        first = keys - queries  # the position of the first query
        ax.set_title(name)
        ax.set_xlabel("key")
        shown = label_positions(keys)
        ax.set_xticks(shown, [labels[j] for j in shown], rotation=0 if tokens is None else 60, ha="center")
        shown = label_positions(queries)
        ax.set_yticks(shown, [labels[first + i] if first >= 0 else str(i) for i in shown])
        if index % columns == 0:
            ax.set_ylabel("query")
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    legend_of_kinds(figure, (SEEN, HIDDEN))
    return figure


@styled
def position_grid(
    positions: Mapping[str, ArrayLike], is_token: ArrayLike, row_labels: Sequence[str], *, title: str | None = None
) -> Figure:
    """Position ids of a left-padded batch: one grid [B, L] per entry, below each other, under its name.

    Each token's cell holds its position id. Where `is_token` [B, L] is False the cell is grey and crossed: padding,
    whose position is ignored.
    """
    real = np.asarray(is_token, dtype=bool)
    rows, length = real.shape
    figure, axes = new_figure(0.55 + len(positions) * (0.62 + 0.27 * rows), len(positions), 1, title)
    for ax, (name, grid) in zip(axes, positions.items(), strict=True):
        values: NDArray[np.int64] = np.asarray(grid, dtype=np.int64)
        if values.shape != real.shape:
            raise ValueError(f"positions[{name!r}] has shape {list(values.shape)}: must be {list(real.shape)}")
        draw_cells(ax, np.where(real, 0, 1), (TOKEN, PAD), mark_size=60)
        for row, column in np.argwhere(real):
            ax.text(column, row, str(values[row, column]), ha="center", va="center", color=BLACK, size=8.5)
        ax.set_title(name)
        ax.set_yticks(range(rows), list(row_labels))
        ax.set_xticks(label_positions(length, 24))
    axes[-1].set_xlabel("column of the batch")
    legend_of_kinds(figure, (TOKEN, PAD))
    return figure
