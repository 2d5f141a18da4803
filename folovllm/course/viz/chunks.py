"""Chunked prefill: the mask in chunks, what fills a step, and latency over the chunk size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from folovllm.course.viz.batching import Spread
from folovllm.course.viz.masks import HIDDEN
from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    DASHES,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    SERIES,
    SKY,
    WHITE,
    Kind,
    draw_cells,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)
from folovllm.engine.trace import StepTrace

OF_THIS_PASS = Kind("visible: a key of the same pass", BLUE, "o")
CACHED = Kind("visible: a key from the cache", SKY, "s", BLACK)
LOOKS = {
    "decode": ("decodes, one token each", ORANGE, ""),
    "prefill": ("prompt tokens computed", BLUE, "///"),
    "cached": ("prompt tokens found in the cache", PALE, "..."),
}
NEAR = 1.3  # a budget above the highest bar by more than this factor is written in the title


# --- the mask ----------------------------------------------------------------------------------------------------


def chunk_masks(chunks: Sequence[int]) -> list[NDArray[np.int64]]:
    """The part of the causal mask that each chunk's pass computes: a rectangle [queries, keys so far] per chunk.

    A cell is 0 where the key is hidden, 1 where it belongs to the same pass, 2 where it is in the cache. Raises
    ValueError for no chunks, or a chunk without tokens.
    """
    if not chunks or min(chunks) < 1:
        raise ValueError(f"chunks={list(chunks)}; allowed: at least one, each of at least 1 token")
    ends = np.cumsum([0, *chunks])
    masks = []
    for start, end in pairwise(ends):
        seen = np.arange(end)[None] <= np.arange(start, end)[:, None]  # [queries, keys]
        masks.append(np.where(np.arange(end) < start, 2, 1) * seen)
    return masks


@styled
def chunked_mask(chunks: Sequence[int], *, title: str | None = None) -> Figure:
    """One causal mask twice: computed in one pass (left), and in one pass per chunk (right, from the top).

    Query i is row i, key j is column j. A chunk's rectangle has a row for each of its tokens and a column for each
    token so far: the keys of this chunk, and the cached keys of earlier passes.
    """
    rectangles = chunk_masks(chunks)
    total = sum(chunks)
    cell = min(0.27, 2.5 / total)
    figure, axes = new_figure(
        0.75 + 0.3 * (title is not None) + cell * total + 0.52 * len(chunks), len(chunks), 2, title,
        height_ratios=[cell * size + 0.5 for size in chunks],
    )  # fmt: skip
    grid = axes[0].get_gridspec()
    if grid is None:
        raise RuntimeError("axes of a grid of subplots have no grid")
    for ax in axes[0::2]:
        ax.remove()
    left = figure.add_subplot(grid[:, 0])
    kinds = (HIDDEN, OF_THIS_PASS, CACHED)
    (whole,) = chunk_masks([total])
    panels: list[tuple[Axes, NDArray[np.int64], str]] = [(left, whole, f"one pass: {list(whole.shape)}")]
    panels += [
        (ax, rectangle, f"pass {number}: {list(rectangle.shape)}")
        for number, (ax, rectangle) in enumerate(zip(axes[1::2], rectangles, strict=True), start=1)
    ]
    for ax, rectangle, name in panels:
        draw_cells(ax, rectangle, kinds, mark_size=12 if total <= 16 else 4)
        queries, keys = rectangle.shape
        ax.set_title(name)
        ax.set_xticks(label_positions(keys, 20))
        shown = label_positions(queries, 20)
        ax.set_yticks(shown, [str(keys - queries + i) for i in shown])
        ax.set_ylabel("query")
        ax.set_aspect("equal", anchor="NW")
    for end in np.cumsum(chunks)[:-1]:
        left.axhline(end - 0.5, color=BLACK, lw=1.4, ls="--")
    for ax in axes[1::2]:
        ax.set_xlim(-0.5, total - 0.5)  # cells have one width in all panels
        queries, keys = ax.images[0].get_size()
        ax.axvspan(keys - 0.5, total, color=WHITE, zorder=3)  # over grid lines where there are no keys yet
        ax.spines[:].set_visible(False)
        ax.add_patch(Rectangle((-0.5, -0.5), keys, queries, fill=False, ec=GREY, lw=0.8, zorder=4, clip_on=False))
    for ax in (left, axes[-1]):
        ax.set_xlabel("key")
    legend_of_kinds(figure, kinds)
    return figure


# --- what fills a step ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """What fills the steps of a run, one number per step."""

    budget: int  # max_num_batched_tokens
    # decodes, prefills: tokens computed for requests in decode, and for prompts or recomputed K/V
    decodes: Sequence[int]
    prefills: Sequence[int]
    # Prompt tokens of requests admitted in the step that were cache hits: not computed, so they use no budget
    cached: Sequence[int]
    complete: Sequence[int]  # prompts completed in the step, whose first token was sampled


def composition(trace: Iterable[StepTrace]) -> Composition:
    """What fills the steps of a trace of at least one step."""
    steps = list(trace)
    decodes = [sum(r.num_scheduled for r in s.requests if r.num_prompt == 0 and r.num_scheduled == 1) for s in steps]
    return Composition(
        steps[0].token_budget,
        decodes,
        [step.num_scheduled_tokens - count for step, count in zip(steps, decodes, strict=True)],
        [sum(r.num_cached for r in step.requests) for step in steps],
        [sum(r.num_prompt > 0 and r.num_sampled > 0 for r in step.requests) for step in steps],
    )


@styled
def step_composition(runs: Mapping[str, Composition], *, share_scale: bool = False, title: str | None = None) -> Figure:
    """Tokens of each step: decodes, prompt tokens above them, and dotted the cache hits, which are not computed.

    One panel per run, below each other, on one axis of steps. A dashed line is the budget; a budget far above all bars
    is written in the title. A triangle marks each step that completes a prompt and samples its first token.
    share_scale: one scale of tokens for all panels.
    """
    figure, axes = new_figure(
        0.9 + 0.3 * (title is not None) + 1.35 * len(runs), len(runs), 1, title, sharex=True, sharey=share_scale
    )
    used: set[str] = set()
    tops = {name: np.sum([run.decodes, run.prefills, run.cached], axis=0) for name, run in runs.items()}
    everywhere = max(int(top.max()) for top in tops.values())
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
        x, bottom = np.arange(len(run.decodes)), np.zeros(len(run.decodes), dtype=np.int64)
        for part, heights in zip(LOOKS, (run.decodes, run.prefills, run.cached), strict=True):
            if any(heights):
                _, color, hatch = LOOKS[part]
                ax.bar(x, heights, 0.86, bottom=bottom, color=color, hatch=hatch, ec=GREY, lw=0.4, label=part)
                used.add(part)
            bottom = bottom + np.asarray(heights)
        highest = everywhere if share_scale else int(bottom.max())
        complete = np.flatnonzero(run.complete)
        ax.plot(complete, bottom[complete] + 0.09 * highest, ls="", marker="v", color=BLACK, ms=5, label="complete")
        near = run.budget <= NEAR * highest
        if near:
            ax.axhline(run.budget, color=BLACK, ls="--", lw=1.2, label="budget")
        ax.set_title(f"{name}: {len(x)} step{'s' * (len(x) != 1)}" + ("" if near else f", budget {run.budget:,}"))
        ax.set_ylim(0, 1.22 * max(highest, run.budget if near else 0))
        ax.set_ylabel("tokens")
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[-1].set_xlim(-0.7, max(len(run.decodes) for run in runs.values()) - 0.3)
    axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes[-1].set_xlabel("step")
    (triangle,) = axes[0].plot([], [], ls="", marker="v", color=BLACK, ms=5)
    (dashes,) = axes[0].plot([], [], ls="--", color=BLACK, lw=1.2)
    parts = {label: Patch(fc=color, hatch=hatch, ec=GREY, lw=0.4) for part, (label, color, hatch) in LOOKS.items()
             if part in used}  # fmt: skip
    handles = {**parts, "budget": dashes, "a prompt is complete": triangle}
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower left", ncols=3)
    return figure


# --- latency --------------------------------------------------------------------------------------------------------


@styled
def latency_by_chunk(
    sizes: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[Spread]]],
    *,
    labels: Mapping[int, str] | None = None,
    title: str | None = None,
) -> Figure:
    """Latencies over the chunk size: one panel per kind of latency, with one line per percentile.

    sizes: tokens, on a logarithmic axis. panels: title -> line -> a spread of seconds over rounds per size; the line is
    drawn at the medians in milliseconds, with bars from the least to the greatest. labels: tick labels for some sizes.
    """
    figure, axes = new_figure(3.35 + 0.3 * (title is not None), 1, len(panels), title)
    for ax, (name, lines) in zip(axes, panels.items(), strict=True):
        for i, (label, spreads) in enumerate(lines.items()):
            middle = np.array([1e3 * spread["median"] for spread in spreads])
            low = middle - np.array([1e3 * spread["min"] for spread in spreads])
            high = np.array([1e3 * spread["max"] for spread in spreads]) - middle
            ax.errorbar(sizes, middle, (low, high), ls=DASHES[i], color=SERIES[i], marker=MARKERS[i], capsize=3,
                        elinewidth=1, label=label)  # fmt: skip
        ax.set_title(name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [(labels or {}).get(size, str(size)) for size in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("token budget per step")
        highest = max(1e3 * spread["max"] for spreads in lines.values() for spread in spreads)
        ax.set_ylim(0, highest * (1.08 + 0.085 * len(lines)))  # space for the legend
        ax.grid(axis="y")
        first = next(iter(lines.values()))
        ax.legend(loc="upper left" if first[-1]["median"] > first[0]["median"] else "upper right")
    axes[0].set_ylabel("milliseconds")
    return figure
