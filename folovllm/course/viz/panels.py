"""Panels: what a figure with a slider draws for one value (see `folovllm.course.viz.sliders`).

A panel is drawn on given axes, on scales that do not depend on the value, so that panels can be compared. Each function
returns a text for the panel's title.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from folovllm.course.lessons.fragmentation import Replay
from folovllm.course.viz.blocks import SLOT_LOOKS
from folovllm.course.viz.chunks import CACHED, OF_THIS_PASS, chunk_masks
from folovllm.course.viz.masks import HIDDEN
from folovllm.course.viz.padding import DONE, NEEDED, PADDING, batch_rectangle
from folovllm.course.viz.prefix import hit_tokens
from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREY,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Kind,
    draw_cells,
    label_positions,
)

NOT_YET = Kind("not there yet", WHITE)
FOUND = Kind("cache hit: not computed", SKY, "s", BLACK)
SHARED_BUT_COMPUTED = Kind("shared but computed", YELLOW, "x", BLACK)
OWN = Kind("not shared: computed", BLUE)

STEP_KINDS = (NEEDED, PADDING, DONE, NOT_YET)  # for the legends
CHUNK_KINDS = (HIDDEN, OF_THIS_PASS, CACHED)
REUSE_KINDS = (FOUND, SHARED_BUT_COMPUTED, OWN)


def sampled_panel(
    ax: Axes, before: ArrayLike, after: ArrayLike, labels: Sequence[str], *, top: int = 12, highest: float = 1.0
) -> str:
    """A distribution before and after the sampler's filters: bars of the `top` likeliest tokens.

    before, after: probabilities [V]. Hollow bars are the model's distribution, filled bars the one that is sampled; a
    cross is a token that was filtered out. labels [V]: names of tokens. highest: end of the scale. Returns the number
    of tokens left.
    """
    own, drawn = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    shown = np.argsort(-own, kind="stable")[:top]
    x = np.arange(len(shown))
    ax.bar(x, drawn[shown], 0.72, color=BLUE, label="after the filters")
    ax.bar(x, own[shown], 0.72, fill=False, ec=GREY, lw=1.0, ls="--", label="the model's distribution")
    dropped = x[drawn[shown] == 0]
    if len(dropped):
        (crosses,) = ax.plot(dropped, np.zeros(len(dropped)), ls="", marker="x", color=VERMILLION, label="dropped")
        crosses.set_clip_on(False)  # they are on the axis
    ax.set_xticks(x, [labels[i] for i in shown], rotation=60, ha="right")
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.6, len(shown) - 0.4)
    ax.set_ylim(0, highest)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="y")
    left = int((drawn > 0).sum())
    return f"{left} token{'s' * (left != 1)} left"


def static_step_panel(ax: Axes, prompt_lens: Sequence[int], max_tokens: Sequence[int], fed: int) -> str:
    """The K/V of a static, left-padded batch in its `fed`-th decode step; 0 is the prefill.

    The panel is as wide as the batch in its last step. Returns how many cells are needed.
    """
    codes = batch_rectangle(prompt_lens, max_tokens, fed)  # [B, L + fed]
    width = max(prompt_lens) + max(max_tokens) - 1
    grid = np.full((len(prompt_lens), width), 3, dtype=np.int64)  # [B, W]
    grid[:, : codes.shape[1]] = codes
    draw_cells(ax, grid, STEP_KINDS, mark_size=4 if width > 40 else 10)
    ax.set_xticks(label_positions(width, 20))
    ax.set_yticks(range(len(prompt_lens)))
    ax.set_ylabel("request")
    needed = int((codes == 0).sum())
    return f"{needed} of {codes.size} cells are needed, {needed / codes.size:.0%}"


def held_slots_panel(ax: Axes, run: Replay, num_steps: int) -> str:
    """Held and written slots of memory in a replay, step by step.

    num_steps: end of the axis. Returns the empty share of the held slots and the mean number of running requests.
    """
    written = np.array([step.used for step in run.steps])
    held = np.array([step.used + step.reserved + step.internal for step in run.steps])
    edges = np.arange(len(held) + 1) - 0.5
    _, pale, hatch = SLOT_LOOKS["reserved"]
    ax.stairs(held, edges, fill=True, fc=pale, ec=GREY, hatch=hatch, lw=0.5, label="held and empty")
    ax.stairs(written, edges, fill=True, fc=SLOT_LOOKS["used"][1], label=SLOT_LOOKS["used"][0])
    ax.axhline(run.capacity, color=BLACK, ls="--", lw=1.2, label=f"{run.capacity:,} slots in all")
    ax.set(xlabel="step", ylabel="slots", xlim=(-0.5, num_steps - 0.5), ylim=(0, 1.08 * run.capacity))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return f"{1 - written.sum() / held.sum():.1%} empty, {run.mean_running:.0f} run"


def chunk_rows_panel(ax: Axes, num_tokens: int, chunk: int) -> str:
    """The causal mask of a prompt that is computed in chunks, one below the other.

    Dashed lines separate the passes. Returns the number of passes, and of keys that they read from the cache.
    """
    sizes = [min(chunk, num_tokens - start) for start in range(0, num_tokens, chunk)]
    grid = np.zeros((num_tokens, num_tokens), dtype=np.int64)  # [query, key]
    row, read = 0, 0
    for rectangle in chunk_masks(sizes):
        queries, keys = rectangle.shape
        grid[row : row + queries, :keys] = rectangle
        row, read = row + queries, read + keys - queries
    draw_cells(ax, grid, CHUNK_KINDS, mark_size=7)
    for end in np.cumsum(sizes)[:-1]:
        ax.axhline(end - 0.5, color=BLACK, lw=1.4, ls="--")
    ax.set_xticks(label_positions(num_tokens, 12))
    ax.set_yticks(label_positions(num_tokens, 12))
    ax.set(xlabel="key", ylabel="query")
    ax.set_aspect("equal", anchor="W")
    return f"{len(sizes)} pass{'es' * (len(sizes) != 1)}, {read} from the cache"


def reuse_panel(ax: Axes, shared: int, prompt_len: int, block_sizes: Sequence[int]) -> str:
    """Which tokens of a prompt hit the prefix cache after an equally long prompt with the same first `shared` tokens.

    A row per block size, a column per token, a line after each block. Returns "".
    """
    grid = np.full((len(block_sizes), prompt_len), 2, dtype=np.int64)  # [sizes, T]
    grid[:, :shared] = 1
    found = [hit_tokens(shared, prompt_len, size) for size in block_sizes]
    for row, (size, count) in enumerate(zip(block_sizes, found, strict=True)):
        grid[row, :count] = 0
        for end in range(size, prompt_len, size):
            ax.plot([end - 0.5] * 2, [row - 0.5, row + 0.5], color=BLACK, lw=1.4)
    draw_cells(ax, grid, REUSE_KINDS, mark_size=5)
    ax.set_yticks(range(len(block_sizes)), [f"{s}: {n} hit" for s, n in zip(block_sizes, found, strict=True)])
    ax.set_xticks(label_positions(prompt_len, 16))
    ax.set_ylabel("block size")
    return ""
