"""Batching: when each request waits and runs, how long the queue is, and how throughput grows with the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

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
    VERMILLION,
    WHITE,
    new_figure,
    styled,
)
from folovllm.engine.trace import StepTrace

Spread = Mapping[str, float]  # "median", "min" and "max" of some rounds, as in the files of results/


# --- when requests wait and run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """When one request waited and ran, in seconds on one clock."""

    request_id: str
    arrival: float
    # prefills, decodes: (start, end) of each step that ran it
    prefills: Sequence[tuple[float, float]]
    decodes: Sequence[tuple[float, float]]
    released: float  # when its slot in the batch was free for another request

    @property
    def started(self) -> float:
        """When its first step began."""
        return self.prefills[0][0]

    @property
    def finished(self) -> float:
        """When its last token was known."""
        return max(end for _, end in (*self.prefills, *self.decodes))

    def shifted(self, by: float) -> Life:
        """The same times plus `by` seconds."""

        def moved(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
            return [(start + by, end + by) for start, end in spans]

        return Life(self.request_id, self.arrival + by, moved(self.prefills), moved(self.decodes), self.released + by)


def lives_from_trace(trace: Iterable[StepTrace], arrivals: Mapping[str, float]) -> list[Life]:
    """The requests of an engine's trace, in the order of `arrivals` (by id). A finished request frees its slot at once.

    Raises ValueError for a request that the trace never ran.
    """
    steps = list(trace)
    lives = []
    for request_id, arrival in arrivals.items():
        prefills: list[tuple[float, float]] = []
        decodes: list[tuple[float, float]] = []
        for step in steps:
            for share in step.requests:
                if share.request_id == request_id:
                    span = (step.phases["schedule"][0], step.phases["update"][1])
                    (prefills if share.num_prompt else decodes).append(span)
        if not prefills:
            raise ValueError(f"arrivals has {request_id!r}; allowed: requests whose prompt the trace computes")
        lives.append(Life(request_id, arrival, prefills, decodes, (decodes or prefills)[-1][1]))
    return lives


def lives_from_batches(
    batches: Sequence[Mapping[str, Any]], arrivals: Sequence[float], token_times: Sequence[Sequence[float]]
) -> list[Life]:
    """The requests of static batches: all slots of a batch are held until its longest request is done.

    batches: {"requests": indices, "start": s, "end": s} each. arrivals, token_times: seconds, per request.
    """
    lives: dict[int, Life] = {}
    for batch in batches:
        for index in batch["requests"]:
            known = list(token_times[index])
            prefill = (batch["start"], known[0])
            lives[index] = Life(str(index), arrivals[index], [prefill], list(pairwise(known)), batch["end"])
    return [lives[index] for index in sorted(lives)]


@styled
def batch_gantt(arms: Mapping[str, Sequence[Life]], *, title: str | None = None) -> Figure:
    """When each request waits and runs: one panel per way to batch, in milliseconds since the panel's first arrival.

    One lane per request: a thin grey bar while it waits, then a bar per step, blue for its prefill and orange for
    decodes. The time between its last token and the moment its batch slot is free is hatched, with its milliseconds
    where they fit. A panel's title says when all requests were done, and the idle share of the slots' time.
    """
    zeros = {name: min(life.arrival for life in lives) for name, lives in arms.items()}
    length = {name: max(life.released for life in lives) - zeros[name] for name, lives in arms.items()}
    heights = [0.45 + 0.135 * len(lives) for lives in arms.values()]
    figure, axes = new_figure(
        0.75 + 0.3 * (title is not None) + sum(heights), len(arms), 1, title, sharex=True, height_ratios=heights
    )
    longest = 1e3 * max(length.values())
    for ax, (name, lives) in zip(axes, arms.items(), strict=True):
        for lane, life in enumerate(lives):
            _draw_life(ax, lane, life, zeros[name], longest)
        held = sum(life.released - life.finished for life in lives)
        share = held / sum(life.released - life.started for life in lives)
        note = f", batch slots idle {share:.0%} of the time" if share >= 5e-3 else ""
        ax.set_title(f"{name}: all done after {1e3 * length[name]:.0f} ms{note}")
        ax.axvline(1e3 * length[name], color=BLACK, linewidth=1)
        ax.set_yticks(range(len(lives)), [life.request_id for life in lives], size=7.5)
        ax.set_ylim(len(lives) - 0.4, -0.6)
        ax.set_ylabel("request")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    axes[-1].set_xlim(0, longest * 1.01)
    axes[-1].set_xlabel("milliseconds since the first request arrived")
    figure.legend(
        handles=[
            Patch(facecolor=PALE, edgecolor=GREY, linewidth=0.5),
            Patch(facecolor=BLUE),
            Patch(facecolor=ORANGE),
            Patch(facecolor=WHITE, hatch="xxxx", edgecolor=VERMILLION, linewidth=0.5),
        ],
        labels=["waiting", "prefill", "decode, step by step", "finished, batch slot not yet free"],
        loc="outside lower left",
        ncols=4,
        columnspacing=1.4,
    )
    return figure


def _draw_life(ax: Axes, lane: int, life: Life, zero: float, longest: float) -> None:
    """One lane of `batch_gantt`; `longest` is the length of the time axis in milliseconds."""

    def spans(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(1e3 * (start - zero), 1e3 * (end - start)) for start, end in pairs]

    ax.broken_barh(
        spans([(life.arrival, life.started)]), (lane - 0.12, 0.24), color=PALE, ec=GREY, lw=0.3, label="waiting"
    )
    ax.broken_barh(spans(life.prefills), (lane - 0.4, 0.8), facecolor=BLUE, ec=WHITE, lw=0.4, label="prefill")
    ax.broken_barh(spans(life.decodes), (lane - 0.4, 0.8), facecolor=ORANGE, ec=WHITE, lw=0.4, label="decode")
    ((left, width),) = spans([(life.finished, life.released)])
    if width > 1e-3 * longest:
        ax.broken_barh(
            [(left, width)], (lane - 0.36, 0.72), facecolor=WHITE, hatch="xxxx", ec=VERMILLION, lw=0.5, label="held"
        )
    if width > 0.075 * longest:
        ax.text(
            left + width / 2, lane, f"{width:.0f} ms", size=7.5, ha="center", va="center_baseline",
            bbox={"fc": WHITE, "ec": "none", "pad": 0.6},
        )  # fmt: skip


# --- the queue ------------------------------------------------------------------------------------------------


def depth_of_trace(trace: Iterable[StepTrace]) -> NDArray[np.int64]:
    """Waiting and running requests in each step, [steps, 2]."""
    return np.array([[step.num_waiting, len(step.requests)] for step in trace])


@styled
def queue_depth(depths: Mapping[str, ArrayLike], *, title: str | None = None) -> Figure:
    """Waiting requests (grey area) and running ones (line) in each step: one panel per [steps, 2] of counts."""
    figure, axes = new_figure(2.3 + 0.3 * (title is not None), 1, len(depths), title, sharex=True, sharey=True)
    for ax, (name, counts) in zip(axes, depths.items(), strict=True):
        waiting, running = np.asarray(counts).T
        edges = np.arange(len(waiting) + 1) - 0.5
        ax.stairs(waiting, edges, fill=True, fc=PALE, ec=GREY, label="waiting")
        ax.stairs(running, edges, color=BLUE, lw=1.8, label="running")
        ax.set_title(f"{name}: {len(waiting)} steps")
        ax.set_xlabel("step")
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("requests")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


@styled
def waiting_times(
    waits: Mapping[str, Sequence[float]], labels: Sequence[str], unit: str = "ms", *, title: str | None = None
) -> Figure:
    """How long each request waited under each policy: a row per request, a marker per policy, in `unit`.

    A dashed line marks a policy's mean; the legend says the mean and the longest wait.
    """
    figure, (ax,) = new_figure(1.2 + 0.21 * len(labels), title=title)
    rows = np.arange(len(labels))
    for i, (policy, values) in enumerate(waits.items()):
        if len(values) != len(labels):
            raise ValueError(f"waits[{policy!r}] has {len(values)} values: must have {len(labels)}, one per label")
        name = f"{policy}: mean {fmean(values):.3g} {unit}, longest {max(values):.3g} {unit}"
        shift = 0.22 * (i - (len(waits) - 1) / 2)
        ax.plot(values, rows + shift, linestyle="", marker=MARKERS[i], markersize=5.5, color=SERIES[i], label=name)
        ax.axvline(fmean(values), color=SERIES[i], linestyle="--", linewidth=1.2)
    ax.set_yticks(rows, list(labels))
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y")
    ax.set_xlim(left=-0.02 * ax.get_xlim()[1])
    ax.set_xlabel(f"time in the queue, {unit}")
    figure.legend(loc="outside lower left", ncols=1)
    return figure


@styled
def starvation(stream: Sequence[int], waits: Mapping[str, Sequence[float]], *, title: str | None = None) -> Figure:
    """Steps that one long request waits, over the number of short requests that arrive: one line per policy."""
    figure, (ax,) = new_figure(2.7, title=title)
    for i, (policy, values) in enumerate(waits.items()):
        ax.plot(stream, values, linestyle=DASHES[i], color=SERIES[i], marker=MARKERS[i], label=policy)
    ax.set_xlabel("short requests, one arrives per step")
    ax.set_ylabel("steps the long request waits")
    ax.set_ylim(bottom=0)
    ax.set_xticks(list(stream))
    ax.grid(axis="y")
    ax.legend(loc="upper left")
    return figure


# --- throughput over batch size ---------------------------------------------------------------------------------


@styled
def throughput_by_batch(
    series: Mapping[str, Mapping[int, Spread]], base: tuple[str, Spread] | None = None, *, title: str | None = None
) -> Figure:
    """Output tokens per second over the largest batch, one line per way to batch; error bars from least to greatest.

    series: name -> requests at once -> spread over rounds. base: a horizontal line at its median, with its range.
    """
    figure, (ax,) = new_figure(3.4, title=title)
    if base is not None:
        name, spread = base
        ax.axhspan(spread["min"], spread["max"], color=PALE, lw=0)
        ax.axhline(spread["median"], color=GREY, linestyle=":", label=name)
    for i, (name, points) in enumerate(series.items()):
        sizes, medians = list(points), np.array([p["median"] for p in points.values()])
        low = medians - np.array([p["min"] for p in points.values()])
        high = np.array([p["max"] for p in points.values()]) - medians
        ax.errorbar(sizes, medians, (low, high), linestyle=DASHES[i], color=SERIES[i], marker=MARKERS[i],
                    capsize=3, elinewidth=1, label=name)  # fmt: skip
    sizes = sorted({size for points in series.values() for size in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("maximum batch size, requests")
    ax.set_ylabel("output tokens per second")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@styled
def ratio_bars(ratios: Mapping[str, Spread], base: str = "M1", *, title: str | None = None) -> Figure:
    """Throughput as a multiple of the base's: a bar per arm at the median of its rounds, a whisker over all rounds."""
    figure, (ax,) = new_figure(0.85 + 0.36 * len(ratios), title=title)
    for row, spread in enumerate(ratios.values()):
        median, low, high = (spread[key] for key in ("median", "min", "max"))
        ax.barh(row, median, 0.62, color=SKY)
        ax.plot([low, high], [row, row], color=BLACK, linewidth=1.4, marker="|", markersize=8)
        text = f"{median:.2f}x  ({low:.2f} to {high:.2f})"
        ax.annotate(text, (max(median, high), row), (6, 0), textcoords="offset points", va="center", size=8.5)
    ax.axvline(1, color=GREY, linestyle=":", linewidth=1.4)
    ax.set_yticks(range(len(ratios)), list(ratios))
    ax.set_ylim(len(ratios) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.32 * max(spread["max"] for spread in ratios.values()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.set_xlabel(f"output tokens per second, as a multiple of {base}'s in the same round")
    return figure
