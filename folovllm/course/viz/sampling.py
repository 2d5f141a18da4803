"""From logits to text: what each filter leaves of a distribution, token equality, and what a stream may show when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

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
    legend_of_kinds,
    new_figure,
    styled,
)

EQUAL, DIFFERENT = Kind("same token", SKY, "."), Kind("another token", VERMILLION, "x")
NOTHING = Kind("no token", WHITE)
_CHARACTERS = 84  # of the monospaced font at 9 points, in the width of a figure


@styled
def filter_stages(
    stages: Mapping[str, ArrayLike], labels: Sequence[str], *, top: int = 20, title: str | None = None
) -> Figure:
    """A distribution before and after each filter: one row of bars per stage, in order, all on the same tokens.

    stages: name -> probabilities [V]. Shown are the `top` likeliest tokens of the first stage, in order of probability;
    `labels` [V] name them. A token of probability 0 has a cross in place of its bar. Each row's title says how many of
    the V tokens are left, and the share of the mass that is shown.
    """
    rows = {name: np.asarray(values, dtype=float) for name, values in stages.items()}
    shown = np.argsort(-next(iter(rows.values())), kind="stable")[:top]
    figure, axes = new_figure(0.95 + 0.95 * len(rows), len(rows), 1, title)
    for ax, (name, probs) in zip(axes, rows.items(), strict=True):
        values = probs[shown]
        x = np.arange(len(shown))
        ax.bar(x, values, color=BLUE, width=0.75)
        dropped = x[values == 0]
        if len(dropped):
            crosses = ax.plot(dropped, np.zeros(len(dropped)), linestyle="", marker="x", color=VERMILLION)
            crosses[0].set_clip_on(False)  # they are on the axis
        left = int((probs > 0).sum())
        ax.set_title(f"{name}: {left} of {len(probs)} tokens left, {values.sum():.0%} of the mass shown")
        ax.set_ylim(0, max(values.max() * 1.12, 1e-9))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.locator_params(axis="y", nbins=3)
        ax.grid(axis="y")
        ax.tick_params(axis="x", length=0)
        ax.set_xticks(range(len(shown)), [])
        ax.set_xlim(-0.6, len(shown) - 0.4)
    axes[-1].set_xticks(range(len(shown)), [labels[i] for i in shown], rotation=60, ha="right")
    figure.supylabel("probability", size=9)
    return figure


@styled
def token_match(matches: Mapping[str, Sequence[bool]], *, title: str | None = None) -> Figure:
    """Token by token against a reference: one row per entry, one column per output token.

    A blue cell with a dot is an equal token, a red cell with a cross a different one. A row ends where its output ends.
    """
    longest = max(len(row) for row in matches.values())
    codes = np.full((len(matches), longest), 2, dtype=np.int64)
    for row, equal in enumerate(matches.values()):
        codes[row, : len(equal)] = np.where(np.asarray(equal, dtype=bool), 0, 1)
    figure, (ax,) = new_figure(1.0 + 0.3 * len(matches), title=title)
    draw_cells(ax, codes, (EQUAL, DIFFERENT, NOTHING), mark_size=8)
    ax.set_yticks(range(len(matches)), list(matches))
    ax.set_xticks(label_positions(longest, 24))
    ax.set_xlabel("output token")
    legend_of_kinds(figure, (EQUAL, DIFFERENT))
    return figure


@dataclass(frozen=True)
class Release:
    """One step of a stream: the new token, the text that may be shown, and the text that is still held back."""

    token: str
    visible: str
    held: str


@styled
def text_release(moments: Sequence[Release], *, width: int = 60, title: str | None = None) -> Figure:
    """A stream, one row per token: the token, the text that may be shown, and behind it the text that is held back.

    Shown text is plain, newly shown text is bold, held text is in a hatched yellow box. Only the last `width`
    characters are drawn.
    """
    figure, (ax,) = new_figure(0.85 + 0.27 * len(moments), title=title)
    token_width = max(len(moment.token) for moment in moments) + 2
    fonts: Any = {"family": ["DejaVu Sans Mono", "DejaVu Sans"], "size": 9, "va": "center"}
    before = ""
    for row, moment in enumerate(moments):
        ax.text(-1.0, row, moment.token, ha="right", color=GREY, **fonts)
        cut = max(0, len(moment.visible) + len(moment.held) - width)
        for column, character in enumerate((moment.visible + moment.held)[cut:]):
            place = cut + column
            if place >= len(moment.visible):
                ax.add_patch(Rectangle((column - 0.5, row - 0.42), 1, 0.84, facecolor=YELLOW, hatch="////",
                                       edgecolor=GREY, linewidth=0))  # fmt: skip
            weight = "bold" if len(before) <= place < len(moment.visible) else "normal"
            ax.text(column, row, character, ha="center", color=BLACK, weight=weight, **fonts)
        before = moment.visible
    ax.set_xlim(-token_width, _CHARACTERS - token_width)
    ax.set_ylim(len(moments) - 0.4, -0.6)
    ax.set_axis_off()
    figure.legend(
        handles=[Rectangle((0, 0), 1, 1, facecolor=YELLOW, hatch="////", edgecolor=GREY, linewidth=0)],
        labels=["held back (left: the token of this step; bold: newly shown)"],
        loc="outside lower left",
    )
    return figure
