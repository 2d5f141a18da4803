"""A report as a figure: throughput and latencies of each system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from folovllm.course.bench.tables import count, number, processor, share

OWN, PEER, INK, MUTED = "#2a6f97", "#b8a07e", "#222222", "#666666"
LATENCIES = (("TTFT", "ttft", -0.16, "#9c4221"), ("ITL", "itl", 0.16, "#2f6f4f"))
MARKERS = (("p50", "o", 5), ("p99", "D", 4), ("max", "|", 10))


def plot(report: dict[str, Any]) -> Figure:
    """A row per workload. Left: output tokens/s. Right: medians of the latencies, on a log scale.

    Raises ValueError for a report without results.
    """
    summary = report["summary"]
    if not summary:
        raise ValueError("the report has no results to plot; allowed: at least one workload")
    heights = [0.8 + 0.4 * len(rows) for rows in summary.values()]
    figure = Figure(figsize=(10.5, sum(heights) + 1.6), layout="constrained")
    axes = figure.subplots(len(summary), 2, squeeze=False, height_ratios=heights, width_ratios=(1.15, 1))
    for (workload, rows), (left, right) in zip(summary.items(), axes, strict=True):
        _throughput(left, rows)
        _latency(right, rows)
        left.set_title(f"{workload}: {report['workloads'][workload]['about']}", loc="left", fontsize=9, color=INK)
    axes[-1][0].set_xlabel(
        f"output tokens/s: median, least and greatest of the rounds;\n"
        f"times {report['base']} (x); share of the roofline (%)",
        fontsize=8,
        color=MUTED,
    )
    axes[-1][1].set_xlabel("ms, log scale", fontsize=8, color=MUTED)
    scale = "" if report["scale"] == 1 else f", lengths x {report['scale']:g}"
    title = f"{report['model']}, {report['dtype']}, {processor(report)}, {count(len(report['rounds']), 'round')}{scale}"
    figure.suptitle(title, fontsize=10.5, color=INK, x=0.01, ha="left")
    _legend(figure)
    return figure


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report into a PNG file."""
    plot(report).savefig(path, dpi=130)


def _throughput(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    greatest = max(row["output_tokens_per_s"]["max"] for row in rows.values())
    for y, (system, row) in enumerate(rows.items()):
        rate = row["output_tokens_per_s"]
        axes.barh(y, rate["median"], height=0.62, color=PEER if system.startswith("hf:") else OWN)
        axes.plot([rate["min"], rate["max"]], [y, y], color=INK, linewidth=1.1, marker="|", markersize=6)
        notes = [number(rate["median"])]
        if row["ratio_to_base"] is not None:
            notes.append(f"{row['ratio_to_base']['median']:.2f}x")
        if row["roofline_share"] is not None:
            notes.append(share(row["roofline_share"]["median"]))
        axes.text(rate["max"] + greatest * 0.02, y, "   ".join(notes), va="center", fontsize=8, color=INK)
    axes.set_xlim(0, greatest * 1.42)
    _plain_axes(axes, list(rows))


def _latency(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    seen: list[float] = []
    for y, row in enumerate(rows.values()):
        for _, name, offset, color in LATENCIES:
            points = [
                (row[f"{name}_{q}_s"]["median"] * 1e3, marker, size)
                for q, marker, size in MARKERS
                if row[f"{name}_{q}_s"] is not None
            ]
            if not points:
                continue
            axes.plot([points[0][0], points[-1][0]], [y + offset] * 2, color=color, linewidth=1)
            for x, marker, size in points:
                axes.plot(x, y + offset, marker, color=color, markersize=size)
                seen.append(x)
    axes.set_xscale("log")
    if seen:
        axes.set_xlim(min(seen) / 1.6, max(seen) * 1.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    few_decades = bool(seen) and max(seen) / min(seen) < 30
    axes.xaxis.set_minor_formatter(
        FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "") if few_decades else NullFormatter()
    )
    _plain_axes(axes, [""] * len(rows))


def _plain_axes(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", which="both", labelsize=7.5, labelcolor=MUTED)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure) -> None:
    lines = [Line2D([], [], color=color, linewidth=3, label=label) for label, _, _, color in LATENCIES]
    points = [Line2D([], [], color=MUTED, linestyle="", marker=m, markersize=s, label=q) for q, m, s in MARKERS]
    figure.legend(
        handles=[*lines, *points], loc="outside upper right", ncols=5, fontsize=8, frameon=False, columnspacing=1.2
    )
