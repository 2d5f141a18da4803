"""Timelines from an engine's trace: latencies of requests, their steps, and the phases of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from folovllm.course.viz.style import (
    BLACK,
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    VERMILLION,
    WHITE,
    Kind,
    draw_cells,
    engineering,
    label_positions,
    legend_of_kinds,
    new_figure,
    styled,
)
from folovllm.engine.trace import PHASES, StepTrace
from folovllm.outputs import RequestOutput

AWAY = Kind("not in the engine", WHITE)
WAITING = Kind("waiting", PALE, "_", GREY)
PREFILL = Kind("prefill", BLUE, "s")
DECODE = Kind("decode", ORANGE, ".", BLACK)


@styled
def latency_timeline(
    trace: Iterable[StepTrace], outputs: Sequence[RequestOutput], *, title: str | None = None
) -> Figure:
    """TTFT, ITL and end-to-end latency of real requests, in milliseconds since the first arrival.

    One lane per request: a hatched bar from its arrival to its first step (the queue), then a bar for each step that
    ran it (prefill dark, decode light), and a triangle for each new token. Brackets under the last request show its
    queue time, TTFT, first inter-token latency and end-to-end latency, each with its value.
    """
    steps = list(trace)
    zero = min(output.metrics.arrival_time for output in outputs)
    figure, (ax,) = new_figure(1.35 + 0.55 * len(outputs) + 1.1, title=title)
    for lane, output in enumerate(outputs):
        metrics = output.metrics
        queue = 1e3 * (metrics.queue_time or 0.0)
        ax.barh(lane, queue, left=1e3 * (metrics.arrival_time - zero), height=0.5, color=PALE, hatch="///",
                edgecolor=GREY, linewidth=0.5)  # fmt: skip
        for step in steps:
            share = next((r for r in step.requests if r.request_id == output.request_id), None)
            if share is not None:
                color = PREFILL.color if share.num_prompt else DECODE.color
                start = 1e3 * (step.phases["schedule"][0] - zero)
                ax.barh(lane, 1e3 * step.duration, left=start, height=0.5, color=color, edgecolor=WHITE, linewidth=0.6)
        known = [1e3 * (t - zero) for t in metrics.token_times]
        ax.plot(known, [lane - 0.36] * len(known), linestyle="", marker="v", color=BLACK, markersize=5)
    _brackets(ax, outputs[-1], zero, len(outputs) - 1)
    ax.set_ylim(len(outputs) + 1.55, -0.65)
    ax.set_yticks(range(len(outputs)), [f"request {output.request_id}" for output in outputs])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(left=0)
    ax.set_xlabel("milliseconds since the first request arrived")
    (tokens,) = ax.plot([], [], linestyle="", marker="v", color=BLACK, markersize=5)
    figure.legend(
        handles=[
            Patch(facecolor=PALE, hatch="///", edgecolor=GREY, linewidth=0.5),
            Patch(facecolor=PREFILL.color),
            Patch(facecolor=DECODE.color),
            tokens,
        ],
        labels=["in the queue", "prefill step", "decode step", "new token"],
        loc="outside lower left",
        ncols=4,
    )
    return figure


def _brackets(ax: Axes, output: RequestOutput, zero: float, lane: int) -> None:
    """The latencies of one request as labelled double arrows under its lane."""
    metrics = output.metrics
    arrival, known = 1e3 * (metrics.arrival_time - zero), [1e3 * (t - zero) for t in metrics.token_times]
    spans = [("TTFT", arrival, known[0], 1.17), ("end to end", arrival, known[-1], 1.72)]
    if metrics.queue_time is not None:
        spans.append(("queue", arrival, arrival + 1e3 * metrics.queue_time, 0.62))
    if len(known) > 1:
        spans.append(("ITL", known[0], known[1], 1.17))
    for name, start, end, below in spans:
        y = lane + below
        ax.annotate(
            "",
            (start, y),
            (end, y),
            arrowprops={"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "shrinkA": 0, "shrinkB": 0},
        )
        text, narrow = f"{name} {end - start:.1f} ms", name == "ITL"
        ax.annotate(
            text, (end if narrow else (start + end) / 2, y), (6, 0) if narrow else (0, -10),
            textcoords="offset points", ha="left" if narrow else "center", va="center", size=8.5,
        )  # fmt: skip


@styled
def request_gantt(
    trace: Iterable[StepTrace],
    request_ids: Sequence[str],
    *,
    submitted: Mapping[str, int] | None = None,
    endings: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Figure:
    """Each request step by step: one row per request, one column per step of the trace, counted from 0.

    A cell is grey with a bar while the request waits, blue with a square in a step that computes prompt tokens, orange
    with a dot in a decode step, and white before it arrives and after it ends. submitted: the trace index of the first
    step after its arrival (default 0). endings: a text at the end of its row, such as its finish reason.
    """
    steps = list(trace)
    codes = np.zeros((len(request_ids), len(steps)), dtype=np.int64)
    for row, request_id in enumerate(request_ids):
        ran = [
            (column, share)
            for column, step in enumerate(steps)
            for share in step.requests
            if share.request_id == request_id
        ]
        last = ran[-1][0] if ran else len(steps) - 1
        codes[row, (submitted or {}).get(request_id, 0) : last + 1] = 1
        for column, share in ran:
            codes[row, column] = 2 if share.num_prompt else 3
    figure, (ax,) = new_figure(1.1 + 0.34 * len(request_ids), title=title)
    draw_cells(ax, codes, (AWAY, WAITING, PREFILL, DECODE))
    for row, request_id in enumerate(request_ids):
        lived = np.flatnonzero(codes[row])
        if request_id in (endings or {}) and len(lived):
            ax.text(
                lived[-1] + 0.7,
                row,
                (endings or {})[request_id],
                va="center",
                size=8.5,
                bbox={"fc": WHITE, "ec": WHITE, "pad": 1.5},
            )
    ax.set_yticks(range(len(request_ids)), list(request_ids))
    shown = label_positions(len(steps), 20)
    ax.set_xticks(shown, [str(steps[i].step - steps[0].step) for i in shown])
    ax.set_xlabel("step")
    legend_of_kinds(figure, (WAITING, PREFILL, DECODE))
    return figure


@styled
def phase_times(trace: Iterable[StepTrace], *, title: str | None = None) -> Figure:
    """The time of each phase of a step: mean milliseconds on a logarithmic axis.

    One row per phase, in the order in which they run: a square for steps with prompt tokens, a circle for decode-only
    steps. Beside each mark: its value, and its share of the step if that is at least 0.1 %.
    """
    steps = list(trace)
    groups = {
        "steps with a prefill": [s for s in steps if s.num_prefills],
        "decode-only steps": [s for s in steps if not s.num_prefills],
    }
    figure, (ax,) = new_figure(3.5, title=title)
    looks = ((BLUE, MARKERS[1], -0.17), (VERMILLION, MARKERS[0], 0.17))
    for (name, group), (color, marker, shift) in zip(groups.items(), looks, strict=True):
        if not group:
            continue
        means = [1e3 * fmean(s.phases[p][1] - s.phases[p][0] for s in group) for p in PHASES]
        rows = np.arange(len(PHASES)) + shift
        ax.plot(means, rows, linestyle="", marker=marker, color=color, label=f"{name} ({len(group)})")
        whole = 1e3 * fmean(s.duration for s in group)
        for row, value in zip(rows, means, strict=True):
            text = engineering(value / 1e3, "s") + (f", {value / whole:.1%}" if value >= 1e-3 * whole else "")
            ax.annotate(text, (value, row), (8, 0), textcoords="offset points", va="center", size=8.5, color=color)
    ax.set_yticks(range(len(PHASES)), PHASES)
    ax.invert_yaxis()
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * 12)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("milliseconds per step")
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower left", ncols=2)
    return figure
