"""Tensor shapes through the stages of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from folovllm.course.viz.style import BLACK, GREY, PALE, SKY, VERMILLION, new_figure, styled


@styled
def shape_flow(columns: Mapping[str, Sequence[tuple[str, Sequence[int]]]], *, title: str | None = None) -> Figure:
    """Shapes as boxes from top to bottom, one column per step, arrows between them.

    columns: name -> (stage, shape) in the order of the flow; all columns have the same stages, which are named at the
    left. A shape that differs from the first column's has a thick red frame.
    """
    flows = list(columns.values())
    stages = [stage for stage, _ in flows[0]]
    if any([stage for stage, _ in flow] != stages for flow in flows):
        raise ValueError("columns have different stages: all must name the same ones in the same order")
    figure, (ax,) = new_figure(0.75 + 0.42 * len(stages), title=title)
    for row, stage in enumerate(stages):
        ax.text(0.0, row, stage, ha="left", va="center", color=BLACK, size=9)
    for index, (name, flow) in enumerate(columns.items()):
        x = 1.75 + 1.35 * index
        ax.text(x, -0.85, name, ha="center", va="center", weight="bold", size=9)
        for row, (_, shape) in enumerate(flow):
            changed = list(shape) != list(flows[0][row][1])
            ax.add_patch(
                FancyBboxPatch(
                    (x - 0.52, row - 0.27),
                    1.04,
                    0.54,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor=SKY if not changed else PALE,
                    edgecolor=VERMILLION if changed else GREY,
                    linewidth=1.6 if changed else 0.8,
                    alpha=0.9,
                )
            )
            ax.text(x, row, shape_text(shape), ha="center", va="center", family="DejaVu Sans Mono", size=9)
            if row + 1 < len(flow):
                ax.annotate("", (x, row + 0.73), (x, row + 0.27), arrowprops={"arrowstyle": "->", "color": GREY})
    ax.set_xlim(-0.05, 1.75 + 1.35 * (len(columns) - 1) + 0.6)
    ax.set_ylim(len(stages) - 0.55, -1.25)
    ax.set_axis_off()
    return figure


def shape_text(shape: Sequence[int]) -> str:
    """A shape as it is written in comments: "[1, 12, 256]"."""
    return "[" + ", ".join(str(size) for size in shape) + "]"
