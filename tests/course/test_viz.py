"""The figures of the course: what is drawn, not how it looks. Values are read back from the figures' own artists."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle, StepPatch
from matplotlib.text import Annotation
from transformers import LlamaConfig

from folovllm.course.lessons.formulas import (
    attention_flops_per_token,
    linear_flops_per_token,
    linear_tokens_cached,
    linear_tokens_recompute,
)
from folovllm.course.viz import batching, blocks, flow, kv, masks, padding, roofline, sampling, style, timeline
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.engine.trace import PHASES, RequestStep, StepTrace
from folovllm.kv_cache.interface import BlockSnapshot, KVUsage
from folovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput

L = 6
TOKENS = ["The", "cache", "keeps", "keys", "and", "values"]
LOWER = np.tril(np.ones((L, L), dtype=bool))


# --- reading figures ------------------------------------------------------------------------------------------


def cells(ax: Axes) -> np.ndarray:
    """The codes of a grid of cells."""
    (image,) = ax.images
    return np.asarray(image.get_array())


def marks(ax: Axes, label: str) -> set[tuple[int, int]]:
    """(row, column) of the cells that carry the mark of this kind."""
    found = [c for c in ax.collections if c.get_label() == label]
    return {(int(y), int(x)) for c in found for x, y in np.asarray(c.get_offsets())}


def texts(ax: Axes) -> list[str]:
    return [t.get_text() for t in ax.texts if t.get_text()]


def x_labels(ax: Axes) -> list[str]:
    return [t.get_text() for t in ax.get_xticklabels()]


def y_labels(ax: Axes) -> list[str]:
    return [t.get_text() for t in ax.get_yticklabels()]


def legend_labels(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend() is not None)]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(found.get_xdata(), dtype=float), np.asarray(found.get_ydata(), dtype=float)


# --- a trace, written by hand ---------------------------------------------------------------------------------


def a_step(number: int, start: float, forward: float, request_id: str, prompt: int, output: int) -> StepTrace:
    """A step that runs one request: `forward` seconds of forward, 1 ms for each other phase."""
    ends = np.cumsum([0.001, 0.001, forward, 0.001, 0.001]) + start
    phases = {name: (float(end - size), float(end)) for name, end, size in
              zip(PHASES, ends, (0.001, 0.001, forward, 0.001, 0.001), strict=True)}  # fmt: skip
    share = RequestStep(request_id, max(1, prompt), prompt, 0, 10 + output, output, 1, "RUNNING")
    return StepTrace(number, phases, [share], 1, 1, 512, 1, 0, KVUsage(4096, 64, 12))


TRACE = [
    a_step(7, 10.00, 0.096, "a", 40, 1),
    a_step(8, 10.10, 0.016, "a", 0, 2),
    a_step(9, 10.12, 0.046, "b", 20, 1),
    a_step(10, 10.17, 0.006, "b", 0, 2),
    a_step(11, 10.18, 0.006, "b", 0, 3),
]


def an_output(request_id: str, arrival: float, first_step: float, known: list[float]) -> RequestOutput:
    metrics = RequestMetrics(arrival, first_step, known[-1], known)
    completion = CompletionOutput(0, "text", [1] * len(known), finish_reason="length")
    return RequestOutput(request_id, None, [1, 2], [completion], True, metrics)


OUTPUTS = [
    an_output("a", 10.0, 10.0, [10.1, 10.12]),
    an_output("b", 10.0, 10.12, [10.17, 10.18, 10.19]),
]


# Two seats and three requests, 10 ms a step: "0" and "1" start together, "2" takes the seat of "0".
def shared_step(number: int, shares: dict[str, tuple[int, int]], waiting: int, padding_kv: int = 0) -> StepTrace:
    """A step of `shares`: request -> (prompt tokens computed, K/V tokens after it)."""
    start = 5.0 + 0.01 * number
    phases = {"schedule": (start, start), "update": (start, start + 0.01)}
    requests = [RequestStep(i, p or 1, p, 0, known, 1, 1, "RUNNING") for i, (p, known) in shares.items()]
    return StepTrace(number, phases, requests, waiting, len(shares), 64, 1, 0, KVUsage(99, 9, 9),
                     padding_kv_tokens=padding_kv)  # fmt: skip


SHARED = [
    shared_step(0, {"0": (3, 3), "1": (2, 2)}, waiting=1, padding_kv=1),
    shared_step(1, {"0": (0, 4), "1": (0, 3)}, waiting=1, padding_kv=1),
    shared_step(2, {"1": (0, 4), "2": (5, 5)}, waiting=0),
    shared_step(3, {"1": (0, 5)}, waiting=0),
]
# The same in batches of two: "0" has its last token at 20 ms, and its seat is held until 40 ms.
BATCHES = [{"requests": [0, 1], "start": 5.0, "end": 5.04}, {"requests": [2], "start": 5.05, "end": 5.07}]
STATIC = batching.lives_from_batches(
    BATCHES, [5.0, 5.0, 5.0], [[5.01, 5.02], [5.01, 5.02, 5.03, 5.04], [5.06, 5.07]]
)  # fmt: skip


def continuous() -> list[batching.Life]:
    return batching.lives_from_trace(SHARED, {"0": 5.0, "1": 5.0, "2": 4.995})


def spread_of(*rounds: float) -> dict[str, float]:
    return {"median": float(np.median(rounds)), "min": min(rounds), "max": max(rounds)}


SIZES = {
    "padded": {1: spread_of(9, 10, 12), 16: spread_of(50, 60, 70)},
    "loop": {1: spread_of(10, 10, 11), 16: spread_of(10, 11, 12)},
}


# Blocks of 2 slots. "a" and "b" share block 1; "c" gives way in step 2 and comes back in step 4; "a" ends after step 4.
def block_step(
    number: int,
    shares: dict[str, tuple[int, int, int]],
    tables: dict[str, tuple[int, ...]],
    host: dict[str, tuple[int, ...]] | None = None,
    preempted: tuple[str, ...] = (),
) -> StepTrace:
    """A step of `shares`: request -> (tokens computed, prompt tokens among them, tokens sampled); the pool after it."""
    counts = [sum(table.count(block) for table in tables.values()) for block in range(6)]
    snapshot = BlockSnapshot(2, tables, host or {}, tuple(counts), tuple(2 * (n > 0) for n in counts), counts.count(0))
    phases = {"schedule": (float(number), float(number)), "update": (number + 1.0, number + 1.0)}
    requests = [RequestStep(i, n, p, 0, 9, 1, k, "RUNNING") for i, (n, p, k) in shares.items()]
    return StepTrace(number, phases, requests, 0, len(shares), 64, 1, 0, KVUsage(10, 8, 8), preempted=list(preempted),
                     blocks=snapshot)  # fmt: skip


ONE = (1, 0, 1)
RECOMPUTED = [
    block_step(3, {"a": (4, 4, 1)}, {"a": (1, 2)}),
    block_step(4, {"a": ONE, "b": (1, 1, 1), "c": (2, 2, 1)}, {"a": (1, 2), "b": (1, 3), "c": (4,)}),
    block_step(5, {"a": ONE, "b": ONE}, {"a": (1, 2), "b": (1, 3, 5)}, preempted=("c",)),
    block_step(6, {"a": ONE}, {"a": (1, 2), "b": (1, 3, 5)}),  # b runs, but skips this step
    block_step(7, {"a": ONE, "b": ONE, "c": (2, 2, 0)}, {"b": (1, 3, 5), "c": (4,)}),
    block_step(8, {"c": (1, 0, 1)}, {"c": (4, 2)}),
    block_step(9, {"c": ONE}, {}),
]
SWAPPED = [
    *RECOMPUTED[:2],
    block_step(5, {"a": ONE, "b": ONE}, {"a": (1, 2), "b": (1, 3, 5)}, {"c": (2,)}, preempted=("c",)),
    block_step(6, {"a": ONE}, {"a": (1, 2), "b": (1, 3, 5)}, {"c": (2,)}),
    block_step(7, {"a": ONE, "b": ONE, "c": ONE}, {"b": (1, 3, 5), "c": (4,)}),
    block_step(8, {"c": ONE}, {}),
]
SHARES = {
    "max": {"used": 0.2, "reserved": 0.1, "internal": 0.7, "external": 0.0, "free": 0.0},
    "paged": {"used": 0.9, "reserved": 0.02, "internal": 0.01, "external": 0.0, "free": 0.07},
}
SLOTS = {"regions": [(4096, 300), (4096, 400), (1024, 90)], "blocks": [(320, 305), (96, 90)]}
TABLES = {
    "one": blocks.TableState(BlockSnapshot(4, {"a": (2, 1)}, {}, (0, 1, 1, 0), (0, 2, 4, 0), 1), {"a": list("abcdef")}),
    "after a copy": blocks.TableState(
        BlockSnapshot(4, {"a": (2, 1), "b": (2, 3)}, {}, (0, 1, 2, 1), (0, 2, 4, 2), 0),
        {"a": list("abcdef"), "b": list("abcdeF")},
        copies=[(1, 3)],
    ),
}


# --- every figure once, for what holds for all of them ------------------------------------------------------------


def llama_7b() -> LlamaConfig:
    return LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def probabilities() -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(300, 0.05))


POINTS = [
    roofline.RooflinePoint("decode, batch 1", 0.5, 1.1e10, "small"),
    roofline.RooflinePoint("prefill 512", 200.0, 1.2e11, "small"),
    roofline.RooflinePoint("decode, batch 1", 0.52, 2.1e10, "large"),
]
CONTEXT = [100, 1000, 24_704, 49_408, 200_000]

FIGURES: dict[str, Callable[[], Figure]] = {
    "attention_masks": lambda: masks.attention_masks(
        {"causal\nsecond line": LOWER, "upper": LOWER.T, "all": LOWER | LOWER.T}, TOKENS, title="Masks"
    ),
    "position_grid": lambda: masks.position_grid(
        {"counted": [[0, 0, 0, 1], [0, 1, 2, 3]]}, [[0, 0, 1, 1], [1, 1, 1, 1]], ["2 tokens", "4 tokens"], title="P"
    ),
    "kv_cells": lambda: kv.kv_cells({"without": [(0, 3), (0, 4), (0, 5)], "with": [(0, 3), (3, 4), (4, 5)]}, title="K"),
    "kv_drift": lambda: kv.kv_drift({"mask": [[0.0, 3e-7], [0.5, 0.0]], "none": [[0.0, 0.0], [7.0, 1.0]]}, title="D"),
    "cache_timing": lambda: kv.cache_timing([16, 64, 256], [9.0, 12.0, 24.0], [3.0, 3.0, 3.0], [11.0, 35.0, 122.0]),
    "kv_bytes_bars": lambda: kv.kv_bytes_bars(
        [("Llama-2-7B", "MHA", 524_288), ("GQA", "GQA", 131_072), ("MLA", "MLA", 36_864)], title="Bytes"
    ),
    "gemm_sweep": lambda: roofline.gemm_sweep([1, 8, 64, 512], [3e-3, 9e-3, 3e-2, 0.2], 2e6, 4e6, 1e11, 2e10),
    "roofline": lambda: roofline.roofline(1.5e11, 3e10, POINTS, title="Roofline"),
    "attention_share": lambda: roofline.attention_share(
        CONTEXT, {"every key": [0.0, 0.04, 0.5, 0.67, 0.89]}, {"every key": 24_704}, title="Share"
    ),
    "latency_timeline": lambda: timeline.latency_timeline(TRACE, OUTPUTS, title="Two requests"),
    "request_gantt": lambda: timeline.request_gantt(
        TRACE, ["a", "b"], submitted={"b": 1}, endings={"a": "length", "b": "stop (' a stop string')"}, title="Life"
    ),
    "phase_times": lambda: timeline.phase_times(TRACE, title="Parts"),
    "batch_gantt": lambda: batching.batch_gantt({"static, batches of 2": STATIC, "continuous": continuous()}),
    "queue_depth": lambda: batching.queue_depth(
        {policy: batching.depth_of_trace(SHARED) for policy in ("fcfs", "priority", "sjf")}, title="Queue"
    ),
    "waiting_times": lambda: batching.waiting_times(
        {"fcfs": [0.0, 120.0, 30.5], "sjf": [0.0, 8.0, 130.0]}, ["4 + 5", "9 + 48", "20 + 3, urgent"], title="Waits"
    ),
    "starvation": lambda: batching.starvation([0, 4, 8], {"fcfs": [4, 4, 4], "sjf": [4, 8, 12]}),
    "throughput_by_batch": lambda: batching.throughput_by_batch(SIZES, ("M1", spread_of(9, 10, 11)), title="T"),
    "ratio_bars": lambda: batching.ratio_bars({"loop": spread_of(0.9, 1, 1.2), "padded": spread_of(3, 4, 5)}),
    "padding_map": lambda: padding.padding_map(
        {"prefill": padding.batch_rectangle([5, 2]), "the last step's K/V": padding.batch_rectangle([5, 2], [2, 4], 3)},
        title="Cells",
    ),
    "padding_over_steps": lambda: padding.padding_over_steps(
        {"static": padding.kv_cells_of_static([5, 2], [2, 4], 2), "continuous": padding.kv_cells_of_trace(SHARED)}
    ),
    "padding_growth": lambda: padding.padding_growth([2, 8, 16], [25, 50, 100], title="Growth"),
    "filter_stages": lambda: sampling.filter_stages(
        {"own": probabilities(), "cut": np.where(probabilities() > 0.03, probabilities(), 0)},
        [f"_token{i}" for i in range(300)],
        title="Filters",
    ),
    "token_match": lambda: sampling.token_match({"engine": [True] * 40, "control arm": [True, False]}, title="Match"),
    "text_release": lambda: sampling.text_release(
        [sampling.Release("' long token'", "shown " * 20, " held"), sampling.Release("<F0>", "shown ", "<F0>")]
    ),
    "shape_flow": lambda: flow.shape_flow(
        {"prefill": [("token ids", (1, 12)), ("cached keys, layer 0", (1, 2, 12, 32))],
         "decode": [("token ids", (1, 1)), ("cached keys, layer 0", (1, 2, 13, 32))]}, title="Shapes",
    ),
    "block_map": lambda: blocks.block_map(SWAPPED, title="Map"),
    "memory_shares": lambda: blocks.memory_shares(SHARES, title="Shares"),
    "waste_by_block_size": lambda: blocks.waste_by_block_size([1, 16, 256], [0, 8, 120], [0, 0.02, 0.2], title="Waste"),
    "slots_over_steps": lambda: blocks.slots_over_steps(SLOTS, 4096, title="Slots"),
    "block_tables": lambda: blocks.block_tables(TABLES, title="Tables"),
    "preemption_timeline": lambda: blocks.preemption_timeline(
        {"recompute": RECOMPUTED, "swap": SWAPPED}, ["a", "b", "c"], title="Who gives way"
    ),
}  # fmt: skip
every_figure = pytest.mark.parametrize("name", FIGURES)


def check_edges(figure: Figure, sideways: float = 0.01) -> None:
    """Nothing is clipped at the width of a page. sideways: inches that are forgiven on the left and right."""
    width, height = figure.get_size_inches()
    assert width == 7.0
    FigureCanvasAgg(figure).draw()
    box = figure.get_tightbbox()
    assert box.x0 > -sideways and box.y0 > -0.01
    assert box.x1 < width + sideways and box.y1 < height + 0.01


def check_labels(figure: Figure) -> None:
    """Every label can be read."""
    labels = [t for t in figure.findobj(mpl.text.Text) if t.get_text().strip() and t.get_visible()]
    assert labels
    assert min(t.get_fontsize() for t in labels) >= 7.5  # more than 10 pixels


@every_figure
def test_nothing_is_clipped_at_the_width_of_a_page(name: str) -> None:
    check_edges(FIGURES[name]())


@every_figure
def test_every_label_can_be_read(name: str) -> None:
    check_labels(FIGURES[name]())


@every_figure
def test_a_figure_leaves_no_trace_in_global_state(name: str) -> None:
    import matplotlib.pyplot as plt

    # Settings of the reader's own, and unlike the course's: whoever overwrites them is found out at the first figure.
    with mpl.rc_context({"font.size": 23.0, "axes.spines.top": True, "legend.frameon": False}):
        before = dict(mpl.rcParams)
        figure = FIGURES[name]()
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    data, size = figure._repr_png_()  # type: ignore[attr-defined]
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 700
    assert int.from_bytes(data[16:20], "big") == 1400  # twice the pixels, for dense screens


# --- style ----------------------------------------------------------------------------------------------------


def test_the_colours_are_those_of_okabe_and_ito() -> None:
    published = {(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
                 (204, 121, 167)}  # fmt: skip
    own = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in style.SERIES}
    assert own <= published
    assert len(own) == len(style.SERIES) == len(set(style.MARKERS)) == len(set(style.HATCHES))


@pytest.mark.parametrize(
    "kinds",
    [
        (masks.SEEN, masks.HIDDEN),
        (masks.TOKEN, masks.PAD),
        (timeline.WAITING, timeline.PREFILL, timeline.DECODE, blocks.DROPPED, blocks.ON_HOST, blocks.AGAIN),
        (kv.ABSENT, kv.REUSED, kv.COMPUTED),
        (timeline.WAITING, timeline.PREFILL, timeline.DECODE),
        (sampling.EQUAL, sampling.DIFFERENT, sampling.NOTHING),
        (padding.NEEDED, padding.PADDING, padding.DONE),
    ],
)
def test_cells_differ_without_colour(kinds: tuple[style.Kind, ...]) -> None:
    assert len({kind.marker for kind in kinds}) == len(kinds)
    assert len({kind.label for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("codes", [[[0, 2]], [[-1]], [], [0, 1]])
def test_cells_refuse_what_is_no_grid_of_kinds(codes: list[Any]) -> None:
    _, (ax,) = style.new_figure(1.0)
    with pytest.raises(ValueError, match="codes of shape"):
        style.draw_cells(ax, codes, (masks.SEEN, masks.HIDDEN))


def test_numbers_as_people_write_them() -> None:
    assert style.engineering(24_704, "") == "24.7k"
    assert style.engineering(1.53e11, "FLOP/s") == "153 GFLOP/s"
    assert style.engineering(3.1e-5, "s") == "31 µs"
    assert style.engineering(0.9997, "s") == "1 s"
    assert style.engineering(0, "s") == "0 s"
    assert style.binary_bytes(524_288) == "512 KiB"
    assert style.binary_bytes(500 * 2**20) == "500 MiB"
    assert style.binary_bytes(1023) == "1023 B"


def test_ticks_are_thinned_to_round_steps() -> None:
    assert style.label_positions(5) == [0, 1, 2, 3, 4]
    assert style.label_positions(17) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert style.label_positions(64, 24) == list(range(0, 64, 5))
    assert len(style.label_positions(10_000)) <= 16


# --- masks ----------------------------------------------------------------------------------------------------


def test_a_mask_is_drawn_as_given_with_queries_downwards() -> None:
    figure = masks.attention_masks({"causal": LOWER, "upper": LOWER.T}, TOKENS, title="Masks")
    left, right = figure.axes
    assert np.array_equal(cells(left), LOWER)
    assert cells(left)[0].tolist() == [1, 0, 0, 0, 0, 0]  # the first query, at the top, sees itself alone
    assert np.array_equal(cells(right), LOWER.T)
    assert marks(left, masks.SEEN.label) == {(i, j) for i in range(L) for j in range(i + 1)}
    assert left.get_ylim()[0] > left.get_ylim()[1]  # row 0 is at the top
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("causal", "upper")
    assert x_labels(left) == y_labels(left) == TOKENS
    assert (left.get_xlabel(), left.get_ylabel()) == ("key", "query")
    assert legend_labels(figure) == [masks.SEEN.label, masks.HIDDEN.label]
    assert figure.get_suptitle() == "Masks"


def test_the_row_of_a_decode_step_is_named_after_the_last_token() -> None:
    (ax,) = masks.attention_masks({"decode": np.ones((1, L), dtype=bool)}, TOKENS).axes
    assert cells(ax).tolist() == [[1] * L]
    assert y_labels(ax) == ["values"]
    assert x_labels(ax) == TOKENS


@pytest.mark.parametrize("wrong", [{}, {"flat": [True, False]}])
def test_masks_must_be_grids(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="queries, keys"):
        masks.attention_masks(wrong)


def test_position_ids_stand_in_the_cells_of_tokens_only() -> None:
    real = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    counted = np.array([[9, 9, 0, 1], [0, 1, 2, 3]])
    figure = masks.position_grid({"counted": counted, "columns": [[0, 1, 2, 3]] * 2}, real, ["short", "long"])
    first, second = figure.axes
    assert {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in first.texts} == {
        (0, 2): "0", (0, 3): "1", (1, 0): "0", (1, 1): "1", (1, 2): "2", (1, 3): "3"
    }  # fmt: skip
    assert texts(second) == ["2", "3", "0", "1", "2", "3"]
    assert marks(first, masks.PAD.label) == {(0, 0), (0, 1)}
    assert y_labels(first) == ["short", "long"]
    with pytest.raises(ValueError, match="shape"):
        masks.position_grid({"counted": [[0, 1]]}, real, ["short", "long"])


# --- the KV cache -----------------------------------------------------------------------------------------------


def test_kv_cells_are_computed_reused_or_absent() -> None:
    prompt, new = 3, 4
    without = [(0, prompt + i) for i in range(new)]
    cached = [(0, prompt)] + [(prompt + i - 1, prompt + i) for i in range(1, new)]
    left, right = kv.kv_cells({"without": without, "with": cached}).axes
    assert cells(left).tolist() == [[2, 2, 2, 0, 0, 0], [2, 2, 2, 2, 0, 0], [2, 2, 2, 2, 2, 0], [2] * 6]
    assert cells(right).tolist() == [[2, 2, 2, 0, 0, 0], [1, 1, 1, 2, 0, 0], [1, 1, 1, 1, 2, 0], [1, 1, 1, 1, 1, 2]]
    assert marks(right, kv.COMPUTED.label) == {(0, 0), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5)}
    # The counts in the titles are those of the formulas.
    assert left.get_title(loc="left") == f"without: {linear_tokens_recompute(prompt, new)} cells computed"
    assert right.get_title(loc="left") == f"with: {linear_tokens_cached(prompt, new)} cells computed"
    assert y_labels(left) == ["1", "2", "3", "4"]


def test_drift_says_same_or_the_power_of_ten_that_bounds_it() -> None:
    figure = kv.kv_drift({"mask": [[0.0, 3e-7], [0.5, 1.0]], "none": [[0.0, 0.0], [7.0, 10.0]]})
    assert [texts(ax) for ax in figure.axes] == [["same", "-6", "0", "0"], ["same", "same", "1", "1"]]
    assert cells(figure.axes[0])[0, 0] < cells(figure.axes[0])[0, 1] < cells(figure.axes[0])[1, 0]
    scales = {ax.images[0].get_clim() for ax in figure.axes}
    assert len(scales) == 1
    with pytest.raises(ValueError, match="shape"):
        kv.kv_drift({"a": [[0.0]], "b": [[0.0, 1.0]]})


def test_times_and_both_ratios_are_drawn() -> None:
    n, without, cached, flops = [16, 64, 256], [9.0, 12.0, 24.0], [3.0, 4.0, 3.0], [11.4, 35.0, 122.0]
    left, right = kv.cache_timing(n, without, cached, flops).axes
    assert line(left, "without a cache")[1].tolist() == without
    assert line(left, "with a cache")[1].tolist() == cached
    assert line(right, "FLOPs, derived")[1].tolist() == flops
    assert line(right, "time, measured")[1].tolist() == [3.0, 3.0, 8.0]
    assert texts(right) == ["11.4", "35", "122", "3", "3", "8"]
    assert x_labels(left) == ["16", "64", "256"]
    assert left.get_ylim()[0] == 0  # a time axis that starts elsewhere would exaggerate


def test_bars_are_as_long_as_the_bytes() -> None:
    rows = [("Llama-2-7B", "MHA", 524_288), ("eight", "GQA", 131_072), ("DeepSeek-V2", "MLA", 69_120)]
    figure = kv.kv_bytes_bars(rows)
    (ax,) = figure.axes
    bars = sorted((round(p.get_y() + p.get_height() / 2), p.get_width()) for p in ax.patches)
    assert bars == [(0, 524_288), (1, 131_072), (2, 69_120)]
    assert texts(ax) == ["512 KiB", "128 KiB", "67.5 KiB"]
    assert y_labels(ax) == ["Llama-2-7B", "eight", "DeepSeek-V2"]
    assert legend_labels(figure) == ["MHA", "GQA", "MLA"]
    assert len({p.get_hatch() for p in ax.patches}) == 3
    assert ax.get_xlim()[0] == 0


def test_a_kind_of_attention_keeps_its_colour() -> None:
    def colours(rows: list[tuple[str, str, int]]) -> set[str]:
        return {to_hex(p.get_facecolor()) for p in kv.kv_bytes_bars(rows).axes[0].patches}

    both = colours([("x", "MLA", 4), ("y", "MHA", 9)])
    assert colours([("x", "MLA", 4)]) < both
    assert len(both) == 2
    with pytest.raises(ValueError, match="kind='XYZ'"):
        kv.kv_bytes_bars([("x", "XYZ", 4)])


# --- roofline ---------------------------------------------------------------------------------------------------


def test_the_sweep_has_both_bounds_and_the_ridge_where_they_meet() -> None:
    rows, seconds = [1, 8, 64, 512], [3e-3, 9e-3, 3e-2, 0.2]
    flops_per_row, weight_bytes, peak, bandwidth = 2.0 * 1024 * 1024, 4.0 * 1024 * 1024, 1e11, 2e10
    left, right = roofline.gemm_sweep(rows, seconds, flops_per_row, weight_bytes, peak, bandwidth).axes
    assert line(left, "measured")[1] == pytest.approx([3, 9, 30, 200])
    assert line(right, "measured")[1] == pytest.approx([3 / 1, 9 / 8, 30 / 64, 200 / 512])
    x, reading = line(left, "read the weights once")
    computing = line(left, "compute")[1]
    assert reading == pytest.approx([1e3 * weight_bytes / bandwidth] * 4)
    ridge = 10.0  # b/2 * peak / bandwidth, with b = 4 bytes
    assert np.interp(ridge, x, computing) == pytest.approx(reading[0], rel=1e-6)
    assert [t for t in texts(left) if "ridge" in t] == ["ridge: m = 10"]


def test_the_roof_is_the_smaller_of_both_ceilings() -> None:
    figure = roofline.roofline(1.5e11, 3e10, POINTS)
    (ax,) = figure.axes
    x, roof = line(ax, "roof")
    assert roof == pytest.approx(np.minimum(1.5e11, 3e10 * x))
    assert x[0] < 0.5 and x[-1] > 200  # every point is under it
    assert line(ax, "small")[0].tolist() == [0.5, 200.0]
    assert line(ax, "large")[1].tolist() == [2.1e10]
    assert sorted(texts(ax)) == sorted(
        ["decode, batch 1", "prefill 512", "decode, batch 1", "30 GB/s", "150 GFLOP/s", "ridge: 5 FLOP per byte"]
    )
    assert legend_labels(figure) == ["roof", "small", "large"]
    markers = [line.get_marker() for line in ax.lines if line.get_label() in ("small", "large")]
    assert len(set(markers)) == 2


def test_labels_of_points_that_crowd_under_the_roof_cover_nothing() -> None:
    places = [(0.5, 7e9), (2.0, 14e9), (7.9, 39e9), (30.2, 63e9),
              (7.8, 47e9), (30.3, 75e9), (123.0, 86e9), (231.0, 65e9)]  # fmt: skip
    points = [roofline.RooflinePoint(f"prefill {i}", *place, "model") for i, place in enumerate(places)]
    figure = roofline.roofline(9.5e10, 2.5e10, points)
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    labels = [t.get_window_extent() for t in ax.texts if t.get_text().startswith("prefill")]
    assert len(labels) == len(points)
    for i, label in enumerate(labels):
        assert not any(label.overlaps(other) for other in labels[:i])
        assert not any(label.contains(*ax.transData.transform(place)) for place in places)
        x, y = ax.transData.inverted().transform((label.x0, label.y1))
        assert y < min(9.5e10, 2.5e10 * x)


def test_attention_crosses_the_linear_layers_of_llama_2_7b_near_24_7k() -> None:
    config = llama_7b()
    crossing = linear_flops_per_token(config) / attention_flops_per_token(config, 1)
    n = np.array(CONTEXT)
    full, causal = n / (n + crossing), n / (n + 2 * crossing)
    figure = roofline.attention_share(
        CONTEXT, {"full": full, "causal": causal}, {"full": crossing, "causal": 2 * crossing}
    )
    (ax,) = figure.axes
    assert line(ax, "full")[1] == pytest.approx(100 * full)
    assert line(ax, "full")[1][2] == pytest.approx(50)
    assert line(ax, "causal")[1][3] == pytest.approx(50)
    assert texts(ax) == ["24.7k", "49.4k"]
    assert ax.get_ylim() == (0, 100)


# --- timelines --------------------------------------------------------------------------------------------------


def test_latencies_are_those_of_the_trace() -> None:
    figure = timeline.latency_timeline(TRACE, OUTPUTS, title="Two requests")
    (ax,) = figure.axes
    bars = [(round(p.get_y() + p.get_height() / 2), p.get_x(), p.get_width(), to_hex(p.get_facecolor()))
            for p in ax.patches if isinstance(p, Rectangle)]  # fmt: skip
    steps = [bar for bar in bars if bar[3] in (style.BLUE.lower(), style.ORANGE.lower())]
    assert [(lane, round(x), round(width)) for lane, x, width, _ in steps] == [
        (0, 0, 100), (0, 100, 20), (1, 120, 50), (1, 170, 10), (1, 180, 10)
    ]  # fmt: skip
    prefill, decode = timeline.PREFILL.color.lower(), timeline.DECODE.color.lower()
    assert [bar[3] for bar in steps] == [prefill, decode, prefill, decode, decode]
    queues = [bar for bar in bars if bar[3] == style.PALE.lower()]
    assert [(lane, round(width)) for lane, _, width, _ in queues] == [(0, 0), (1, 120)]
    # Derived by hand from the arrival at 10.0 and the token times of the second request.
    assert sorted(texts(ax)) == ["ITL 10.0 ms", "TTFT 170.0 ms", "end to end 190.0 ms", "queue 120.0 ms"]
    known = [x for ln in ax.lines if ln.get_marker() == "v" for x in np.atleast_1d(ln.get_xdata())]
    assert [round(float(x)) for x in known] == [100, 120, 170, 180, 190]
    assert y_labels(ax) == ["request a", "request b"]


def test_a_request_with_one_token_has_no_itl() -> None:
    (ax,) = timeline.latency_timeline(TRACE[:1], [an_output("a", 10.0, 10.0, [10.1])]).axes
    assert [t.split()[0] for t in texts(ax)] == ["TTFT", "end", "queue"]


def test_a_life_is_waiting_then_prefill_then_decodes() -> None:
    figure = timeline.request_gantt(TRACE, ["a", "b"], submitted={"b": 1}, endings={"a": "length", "b": "stop"})
    (ax,) = figure.axes
    assert cells(ax).tolist() == [[2, 3, 0, 0, 0], [0, 1, 2, 3, 3]]
    assert marks(ax, timeline.WAITING.label) == {(1, 1)}
    assert [(t.get_text(), t.get_position()) for t in ax.texts] == [("length", (1.7, 0)), ("stop", (4.7, 1))]
    assert x_labels(ax) == ["0", "1", "2", "3", "4"]
    assert y_labels(ax) == ["a", "b"]


def test_a_request_that_never_ran_waits_to_the_end() -> None:
    (ax,) = timeline.request_gantt(TRACE, ["a", "nobody"]).axes
    assert cells(ax).tolist() == [[2, 3, 0, 0, 0], [1] * 5]


def test_phases_are_means_with_their_share_of_the_step() -> None:
    figure = timeline.phase_times(TRACE)
    (ax,) = figure.axes
    x, y = line(ax, "steps with a prefill (2)")
    assert x == pytest.approx([1, 1, (96 + 46) / 2, 1, 1])
    assert np.round(y).tolist() == [0, 1, 2, 3, 4]
    assert line(ax, "decode-only steps (3)")[0] == pytest.approx([1, 1, (16 + 6 + 6) / 3, 1, 1])
    assert y_labels(ax) == list(PHASES)
    assert "71 ms, 94.7%" in texts(ax)  # 71 of 75
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first phase at the top


# --- batching ---------------------------------------------------------------------------------------------------


def bars(ax: Axes, label: str) -> list[tuple[int, float, float]]:
    """(lane, start, width), in milliseconds, of the bars of one kind."""
    found = []
    for collection in ax.collections:
        if collection.get_label() == label:
            for path in collection.get_paths():
                x, y = path.vertices[:4, 0], path.vertices[:4, 1]
                found.append((round(float(y.mean())), round(float(x.min()), 3), round(float(np.ptp(x)), 3)))
    return found


def test_a_life_in_a_batch_ends_with_the_batch_and_in_an_engine_with_its_request() -> None:
    figure = batching.batch_gantt({"static": STATIC, "continuous": continuous()}, title="The same three")
    top, below = figure.axes
    assert bars(top, "prefill") == [(0, 0, 10), (1, 0, 10), (2, 50, 10)]
    assert bars(top, "decode") == [(0, 10, 10), (1, 10, 10), (1, 20, 10), (1, 30, 10), (2, 60, 10)]
    assert bars(top, "held") == [(0, 20, 20)]
    assert bars(top, "waiting") == [(0, 0, 0), (1, 0, 0), (2, 0, 50)]
    assert texts(top) == ["20 ms"]
    # Request 2 came 5 ms before the others, so that panel's clock starts there.
    assert bars(below, "prefill") == [(0, 5, 10), (1, 5, 10), (2, 25, 10)]
    assert bars(below, "decode") == [(0, 15, 10), (1, 15, 10), (1, 25, 10), (1, 35, 10)]
    assert bars(below, "held") == []
    assert bars(below, "waiting") == [(0, 5, 0), (1, 5, 0), (2, 0, 25)]
    # 20 of 40 + 40 + 20 ms of taken seats.
    assert top.get_title(loc="left") == "static: all done after 70 ms, batch slots idle 20% of the time"
    assert below.get_title(loc="left") == "continuous: all done after 45 ms"
    assert top.get_xlim() == below.get_xlim() == pytest.approx((0, 70.7))
    assert y_labels(top) == ["0", "1", "2"]
    assert len(legend_labels(figure)) == 4


def test_lives_can_be_put_on_another_clock_and_need_a_prompt_that_was_computed() -> None:
    moved = [life.shifted(-5.0) for life in STATIC]
    assert moved[0].prefills == [pytest.approx((0, 0.01))]
    assert moved[2].decodes == [pytest.approx((0.06, 0.07))]
    assert (moved[0].arrival, moved[0].finished, moved[0].released) == pytest.approx((0, 0.02, 0.04))
    a, b = (batching.batch_gantt({"x": lives}) for lives in (STATIC, moved))
    assert bars(a.axes[0], "decode") == bars(b.axes[0], "decode")
    with pytest.raises(ValueError, match="'9'"):
        batching.lives_from_trace(SHARED, {"9": 0.0})


def test_a_rectangle_holds_tokens_padding_and_what_is_left_of_finished_requests() -> None:
    prompts, most = [3, 1, 2], [4, 1, 2]
    assert padding.batch_rectangle(prompts).tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0]]
    # Request 1 asked for one token, which the prefill gave; request 2 feeds one and is done after that.
    assert padding.batch_rectangle(prompts, most, 1).tolist() == [[0, 0, 0, 0], [1, 1, 2, 2], [1, 0, 0, 0]]
    assert padding.batch_rectangle(prompts, most, 2).tolist() == [[0] * 5, [1, 1, 2, 2, 2], [1, 2, 2, 2, 2]]


def test_one_long_prompt_beside_seven_of_one_token_is_mostly_padding() -> None:
    figure = padding.padding_map({"prefill": padding.batch_rectangle([100] + [1] * 7)})
    (ax,) = figure.axes
    assert (cells(ax) == 0).sum() == 107
    assert marks(ax, padding.PADDING.label) == {(row, column) for row in range(1, 8) for column in range(99)}
    assert ax.get_title(loc="left") == "prefill: 107 of 800 cells needed, 86.6% padding"
    assert legend_labels(figure) == [padding.NEEDED.label, padding.PADDING.label]


def test_a_map_counts_what_finished_requests_leave_behind() -> None:
    figure = padding.padding_map({"K/V": padding.batch_rectangle([5, 2], [2, 4], 3)})
    (ax,) = figure.axes
    assert marks(ax, padding.DONE.label) == {(0, column) for column in range(8)}
    assert ax.get_title(loc="left") == "K/V: 5 of 16 cells needed, 18.8% padding, 50.0% of finished requests"
    assert legend_labels(figure)[-1] == padding.DONE.label


def test_cells_of_static_batches_are_those_of_the_bench() -> None:
    # The bench derives them from sums over requests and steps, never from cells.
    from folovllm.course.bench.peers import batch_work
    from folovllm.course.bench.workloads import BenchRequest

    rng = np.random.default_rng(0)
    prompts, most = rng.integers(1, 30, 8).tolist(), rng.integers(1, 20, 8).tolist()
    requests = [BenchRequest([1] * p, m) for p, m in zip(prompts, most, strict=True)]
    found = padding.kv_cells_of_static(prompts, most, 4)
    work = [batch_work(requests[:4]), batch_work(requests[4:])]
    assert len(found) == max(most[:4]) + max(most[4:])
    assert found.sum() == sum(w.kv_columns for w in work)
    assert found[:, 0].sum() == sum(w.kv_columns_needed for w in work)


def test_bars_over_steps_stack_the_cells_of_each() -> None:
    arms = {"static": padding.kv_cells_of_static([5, 2], [2, 4], 2), "continuous": padding.kv_cells_of_trace(SHARED)}
    assert arms["static"].tolist() == [[7, 3, 0], [9, 3, 0], [4, 3, 7], [5, 3, 8]]
    assert arms["continuous"].tolist() == [[5, 1, 0], [7, 1, 0], [9, 0, 0], [5, 0, 0]]
    figure = padding.padding_over_steps(arms)
    top, below = figure.axes
    heights = [[bar.get_height() for bar in container] for container in top.containers]
    assert heights == arms["static"].T.tolist()
    assert [bar.get_y() for bar in top.containers[2]] == [10, 12, 7, 8]
    assert top.get_title(loc="left") == "static: 4 steps, 52% of all cells are wasted"  # 27 of 52
    assert below.get_title(loc="left") == "continuous: 4 steps, 7% of all cells are wasted"  # 2 of 28
    assert top.get_ylim() == below.get_ylim()
    assert top.get_ylim()[0] == 0 < 13 < top.get_ylim()[1]  # no bar is cut off


def test_padding_grows_in_a_straight_line_with_either_number() -> None:
    left, right = padding.padding_growth([2, 8, 16], [25, 100]).axes
    for ax, labels in ((left, ["n = 25", "n = 100"]), (right, ["B = 2", "B = 8", "B = 16"])):
        for label in labels:
            x, y = line(ax, label)
            assert np.diff(y) / np.diff(x) == pytest.approx([y[-1] / (x[-1] - 1)] * (len(x) - 1))
    # What is drawn is what cells say.
    assert line(left, "n = 100")[1][2] == (padding.batch_rectangle([100] + [1] * 7) == 1).sum() == 693
    assert line(right, "B = 8")[1][2] == 693


def test_the_queue_is_that_of_the_trace() -> None:
    assert batching.depth_of_trace(SHARED).tolist() == [[1, 2], [1, 2], [0, 2], [0, 1]]
    figure = batching.queue_depth({"fcfs": batching.depth_of_trace(SHARED), "sjf": [[3, 1], [2, 1]]})
    left, right = figure.axes
    waiting, running = (patch.get_data().values.tolist() for patch in left.patches)
    assert (waiting, running) == ([1, 1, 0, 0], [2, 2, 2, 1])
    assert left.patches[0].get_data().baseline == 0
    assert [ax.get_title(loc="left") for ax in (left, right)] == ["fcfs: 4 steps", "sjf: 2 steps"]
    assert left.get_ylim() == right.get_ylim()
    assert legend_labels(figure) == ["waiting", "running"]


def test_waits_stand_in_the_row_of_their_request_beside_the_mean() -> None:
    figure = batching.waiting_times({"fcfs": [0.0, 60.0, 30.0], "sjf": [0.0, 8.0, 70.0]}, ["a", "b", "c"])
    (ax,) = figure.axes
    fcfs, sjf = "fcfs: mean 30 ms, longest 60 ms", "sjf: mean 26 ms, longest 70 ms"
    assert legend_labels(figure) == [fcfs, sjf]
    assert line(ax, fcfs)[0].tolist() == [0, 60, 30]
    assert np.round(line(ax, sjf)[1]).tolist() == [0, 1, 2]
    assert [ln.get_xdata()[0] for ln in ax.lines if ln.get_linestyle() == "--"] == [30, 26]
    assert y_labels(ax) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 values"):
        batching.waiting_times({"fcfs": [1.0, 2.0]}, ["a", "b", "c"])


def test_starvation_is_drawn_over_the_stream() -> None:
    (ax,) = batching.starvation([0, 4, 8], {"fcfs": [4, 4, 4], "sjf": [4, 8, 12]}).axes
    assert line(ax, "fcfs")[1].tolist() == [4, 4, 4]
    assert line(ax, "sjf")[0].tolist() == [0, 4, 8]
    assert line(ax, "sjf")[1].tolist() == [4, 8, 12]
    assert ax.get_ylim()[0] == 0


def test_throughput_is_the_median_with_its_range_over_the_batch() -> None:
    figure = batching.throughput_by_batch(SIZES, ("M1", spread_of(8, 10, 11)))
    (ax,) = figure.axes
    drawn = {c.get_label(): c for c in ax.containers}
    assert drawn["padded"].lines[0].get_ydata().tolist() == [10, 60]
    (ends,) = drawn["padded"].lines[2]
    assert [segment[:, 1].tolist() for segment in ends.get_segments()] == [[9, 12], [50, 70]]
    assert line(ax, "M1")[1].tolist() == [10, 10]
    (band,) = ax.patches
    assert (band.get_y(), band.get_height()) == (8, 3)
    assert x_labels(ax) == ["1", "16"]
    assert ax.get_ylim()[0] == 0
    assert set(legend_labels(figure)) == {"M1", "padded", "loop"}


def test_ratios_are_bars_from_nothing_with_their_range() -> None:
    (ax,) = batching.ratio_bars({"loop": spread_of(0.9, 1.0, 1.25), "padded": spread_of(3, 4, 5)}).axes
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(0, 1.0), (0, 4)]
    assert texts(ax) == ["1.00x  (0.90 to 1.25)", "4.00x  (3.00 to 5.00)"]
    whiskers = [list(ln.get_xdata()) for ln in ax.lines if ln.get_marker() == "|"]
    assert whiskers == [[0.9, 1.25], [3, 5]]
    assert [ln.get_xdata() for ln in ax.lines if ln.get_linestyle() == ":"] == [[1, 1]]
    assert y_labels(ax) == ["loop", "padded"]
    assert ax.get_xlim()[0] == 0


# --- sampling and text --------------------------------------------------------------------------------------------


def test_bars_are_probabilities_and_crosses_are_what_was_dropped() -> None:
    own = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
    cut = np.array([0.0, 0.5, 0.3, 0.2, 0.0])
    figure = sampling.filter_stages({"own": own, "cut": cut}, list("abcde"), top=4)
    first, second = figure.axes
    heights = [[p.get_height() for p in ax.patches] for ax in (first, second)]
    assert heights[0] == pytest.approx([0.4, 0.25, 0.2, 0.1])
    assert heights[1] == pytest.approx([0.5, 0.3, 0.2, 0.0])
    assert [ln.get_xdata().tolist() for ln in second.lines] == [[3]]
    assert list(first.lines) == []
    assert x_labels(second) == ["b", "c", "d", "e"]
    assert first.get_title(loc="left") == "own: 5 of 5 tokens left, 95% of the mass shown"
    assert second.get_title(loc="left") == "cut: 3 of 5 tokens left, 100% of the mass shown"


def test_tokens_that_differ_are_marked() -> None:
    (ax,) = sampling.token_match({"engine": [True, True, True], "control": [True, False]}).axes
    assert cells(ax).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert marks(ax, sampling.DIFFERENT.label) == {(1, 1)}
    assert y_labels(ax) == ["engine", "control"]


def test_a_stream_shows_and_holds_what_it_was_given() -> None:
    moments = [
        sampling.Release("'Hi'", "Hi", ""),
        sampling.Release("' a'", "Hi", " a"),
        sampling.Release("' cat'", "Hi a cat", ""),
    ]
    (ax,) = sampling.text_release(moments).axes
    rows: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for text in ax.texts:
        x, y = text.get_position()
        rows[int(y)].append((x, text))
    read = {}
    for y, row in rows.items():
        name = next(text.get_text() for x, text in row if x < 0)
        letters = sorted(((x, text) for x, text in row if x >= 0), key=lambda pair: pair[0])
        read[y] = (name, "".join(text.get_text() for _, text in letters))
        bold = "".join(text.get_text() for _, text in letters if text.get_weight() == "bold")
        assert bold == {0: "Hi", 1: "", 2: " a cat"}[y]
    assert read == {0: ("'Hi'", "Hi"), 1: ("' a'", "Hi a"), 2: ("' cat'", "Hi a cat")}
    boxes = [(round(p.get_x() + 0.5), round(p.get_y() + 0.42)) for p in ax.patches]
    assert boxes == [(2, 1), (3, 1)]  # exactly the held " a"


def test_a_long_stream_shows_its_end() -> None:
    (ax,) = sampling.text_release([sampling.Release("x", "0123456789", "HELD")], width=6).axes
    assert "".join(text.get_text() for text in ax.texts[1:]) == "89HELD"
    assert len(ax.patches) == 4


# --- blocks -----------------------------------------------------------------------------------------------------


def test_a_block_map_shows_who_holds_each_block_after_each_step() -> None:
    figure = blocks.block_map(RECOMPUTED, title="The pool")
    (ax,) = figure.axes
    # 0 is free, 1 to 3 are a, b and c alone, 4 to 6 the same in company: block 1 is a's and b's.
    assert cells(ax).tolist() == [
        [1, 4, 4, 4, 2, 0, 0],
        [1, 1, 1, 1, 0, 3, 0],
        [0, 2, 2, 2, 2, 0, 0],
        [0, 3, 0, 0, 3, 3, 0],
        [0, 0, 2, 2, 2, 0, 0],
    ]
    assert marks(ax, blocks.SHARED) == {(0, 1), (0, 2), (0, 3)}
    (given_up,) = [c for c in ax.collections if c.get_label() == "preempted"]
    assert [column for column, _ in np.asarray(given_up.get_offsets()).tolist()] == [2]
    names = [(t.get_text(), round(t.get_position()[0], 1), t.get_position()[1]) for t in ax.texts]
    assert ("a", 1.5, 1) in names and ("b", 2.5, 2) in names and ("c", 4.5, 3) in names
    assert [name for name, _, row in names if row == 0] == ["a", "b"]  # not where it is shared
    assert legend_labels(figure) == ["a", "b", "c", "shared", "free"]
    assert x_labels(ax) == ["0", "1", "2", "3", "4", "5", "6"]
    assert y_labels(ax) == ["1", "2", "3", "4", "5"]


def test_a_block_map_has_a_panel_for_the_host_and_other_names_for_requests() -> None:
    figure = blocks.block_map(SWAPPED, labels={"a": "first", "c": "third"})
    device, host = figure.axes
    assert cells(device).shape == (5, 6)
    assert cells(host).tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 3, 3, 0, 0]]
    assert legend_labels(figure) == ["first", "b", "third", "shared", "free"]
    assert "third" in texts(device)  # above the step in which it gave way
    assert (device.get_ylabel(), host.get_ylabel()) == ("device block", "host block")


def test_a_block_map_agrees_with_the_books_of_a_real_pool() -> None:
    # The oracle is the pool's own reference counts, which the map never reads.
    from folovllm.kv_cache.block_manager import BlockManager
    from folovllm.request import Request
    from folovllm.sampling_params import SamplingParams

    books, steps, rng = BlockManager(12, 2), [], np.random.default_rng(1)
    requests = [Request(name, [0] * 4, SamplingParams(), (), 64) for name in "abcd"]
    for number in range(30):
        request = requests[rng.integers(4)]
        other = requests[(requests.index(request) + 1) % 4]
        if rng.random() < 0.3:
            books.free(request)
        elif (
            rng.random() < 0.3
            and request.request_id in books.snapshot().tables
            and books.get_computed_blocks(request) >= 3
        ):
            books.free(other)
            books.fork(request, other, 3)
        elif (plan := books.allocate_slots(request, int(rng.integers(1, 4)))) is not None:
            books.cache_blocks(plan)
        steps.append(StepTrace(number, {}, [], 0, 0, 1, 1, 0, books.usage(), blocks=books.snapshot()))
    ids = [i for i in "abcd" if any(i in step.blocks.tables for step in steps)]  # type: ignore[union-attr]
    codes = blocks.holders([step.blocks.tables for step in steps], ids, 12)  # type: ignore[union-attr]
    counts = np.array([step.blocks.ref_cnt[1:] for step in steps]).T  # type: ignore[union-attr]
    assert counts.max() > 1
    assert ((codes == 0) == (counts == 0)).all()
    assert ((codes > len(ids)) == (counts > 1)).all()


def test_blocks_cannot_be_drawn_without_snapshots() -> None:
    for draw in (blocks.block_map, lambda trace: blocks.preemption_timeline({"x": trace}, ["a"])):
        with pytest.raises(ValueError, match="trace_blocks=True"):
            draw(TRACE)
        with pytest.raises(ValueError, match="0 snapshots of blocks in 0 steps"):
            draw([])


def test_shares_are_stacked_and_the_papers_stand_in_a_panel_of_their_own() -> None:
    figure = blocks.memory_shares(SHARES, title="Memory")
    ours, paper = figure.axes
    stacks: dict[int, list[tuple[str, float, float]]] = {0: [], 1: []}
    for container in ours.containers:
        for bar in container:
            stacks[round(bar.get_y() + bar.get_height() / 2)].append(
                (container.get_label(), round(bar.get_x(), 6), round(bar.get_width(), 6))
            )
    assert stacks[0] == [("used", 0, 20), ("reserved", 20, 10), ("internal", 30, 70), *(
        (name, 100, 0) for name in ("external", "free"))]  # fmt: skip
    assert stacks[1] == [
        *(("used", 0, 90), ("reserved", 90, 2), ("internal", 92, 1), ("external", 93, 0), ("free", 93, 7))
    ]
    assert texts(ours) == ["20.0 %", "10.0 %", "70.0 %", "90.0 %", "7.0 %"]
    assert (y_labels(ours), ours.get_xlim()) == (["max", "paged"], (0, 100))
    assert len({bar.get_hatch() for container in ours.containers[:4] for bar in container}) == 4
    # Fig. 2 of the vLLM paper, typed off the page.
    assert [round(bar.get_width(), 1) for c in paper.containers for bar in c] == [20.4, 26.8, 38.2, 96.3]
    assert y_labels(paper) == ["Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "vLLM"]
    assert "another workload" in paper.get_xlabel() and "Kwon" in paper.get_xlabel()
    assert paper.get_title(loc="left") == "cited"
    assert len(legend_labels(figure)) == 5


def test_waste_is_drawn_over_the_line_that_theory_gives() -> None:
    left, right = blocks.waste_by_block_size([1, 16, 24, 256], [0, 8, 11, 120], [0, 0.017, 0.03, 0.2]).axes
    x, y = line(left, "(B - 1) / 2")
    assert np.interp([16, 101, 256], x, y) == pytest.approx([8, 50.5, 128], abs=0.5)
    assert np.diff(y) / np.diff(x) == pytest.approx(0.5, rel=0.01)
    assert line(left, "replay")[1].tolist() == [0, 8, 11, 120]
    assert line(right, "empty")[1].tolist() == pytest.approx([0, 1.7, 3, 20])
    assert texts(right) == ["1.7 %", "20 %"]
    assert x_labels(right) == ["1", "16", "256"]
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0


def test_slots_are_drawn_step_by_step_under_one_capacity() -> None:
    figure = blocks.slots_over_steps(SLOTS, 4096, title="Memory")
    for ax, (name, steps) in zip(figure.axes, SLOTS.items(), strict=True):
        drawn = {patch.get_label(): patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)}
        assert drawn["held and empty"].values.tolist() == [held for held, _ in steps]
        assert drawn["K/V of a token"].values.tolist() == [written for _, written in steps]
        assert drawn["K/V of a token"].edges.tolist() == [i - 0.5 for i in range(len(steps) + 1)]
        assert line(ax, "4,096 slots in all")[1].tolist() == [4096, 4096]
        assert ax.get_title(loc="left") == f"{name}: {len(steps)} steps"
        assert (ax.get_xlim(), ax.get_ylim()[0]) == ((-0.5, 2.5), 0)
    assert legend_labels(figure) == ["held and empty", "K/V of a token", "4,096 slots in all"]


def test_a_table_points_to_its_blocks_and_a_copy_from_its_source() -> None:
    figure = blocks.block_tables(TABLES, title="Sharing")
    one, two = figure.axes

    # A unit is a slot, a block has four and a gap of one: logical block i and physical block i + 1 begin at 5 i.
    def arrows(ax: Axes) -> list[tuple[float, float]]:
        return [(t.xyann[0], t.xy[0]) for t in ax.texts if isinstance(t, Annotation)]

    assert arrows(one) == [(2, 7), (7, 2)]  # a: [2, 1]
    assert arrows(two)[:4] == [(2, 7), (7, 2), (2, 7), (7, 12)]  # b: [2, 3]
    ((source, target),) = arrows(two)[4:]
    assert 0 < source < 4 and 10 < target < 14
    assert [t for t in texts(one) if len(t) > 1] == ["pool", "ref 1", "ref 1", "free"]
    assert [t for t in texts(two) if len(t) > 1] == ["pool", "ref 1", "ref 2", "ref 1", "copy"]
    # Each written slot carries its text, in the row of the request and in the pool: "e" stands in two copies.
    letters = [t for t in texts(two) if t in "abcdefF"]
    assert {letter: letters.count(letter) for letter in "cefF"} == {"c": 3, "e": 4, "f": 2, "F": 2}
    bold = [t.get_text() for t in two.texts if t.get_weight() == "bold"]
    assert bold == ["a", "b", "pool", "ref 2"]


def test_the_pool_shows_the_longest_text_of_a_shared_block() -> None:
    snapshot = BlockSnapshot(4, {"a": (1,), "b": (1,)}, {}, (0, 2), (0, 3), 0)
    (ax,) = blocks.block_tables({"": blocks.TableState(snapshot, {"a": ["x", "y"], "b": ["x", "y", "z"]})}).axes
    rows: dict[float, str] = {}
    for t in ax.texts:
        if t.get_text() in ("x", "y", "z"):
            rows[t.get_position()[1]] = rows.get(t.get_position()[1], "") + t.get_text()
    assert [rows[y] for y in sorted(rows)] == ["xy", "xyz", "xyz"]  # a above, the pool, b below


def test_who_gave_way_is_away_until_it_comes_back() -> None:
    figure = blocks.preemption_timeline({"recompute": RECOMPUTED, "swap": SWAPPED}, ["a", "b", "c"])
    recompute, swap = figure.axes
    kinds = ("away", "waiting", "prefill", "decode", "dropped", "host", "again")

    def lives(ax: Axes) -> list[list[str]]:
        return [[kinds[code] for code in row] for row in cells(ax)]

    first, rest = ["waiting"], ["away"]
    assert lives(recompute) == [
        ["prefill", *["decode"] * 4, *rest * 2],
        [*first, "prefill", "decode", "waiting", "decode", *rest * 2],
        [*first, "prefill", "dropped", "dropped", "again", "again", "decode"],  # its return takes two pieces
    ]
    assert lives(swap)[2] == [*first, "prefill", "host", "host", "decode", "decode", "away"]
    assert recompute.get_title(loc="left") == "recompute: 7 steps, preempted 1 time"
    assert marks(swap, blocks.ON_HOST.label) == {(2, 2), (2, 3)}
    assert legend_labels(figure) == [
        kind.label
        for kind in (timeline.WAITING, timeline.PREFILL, timeline.DECODE, blocks.DROPPED, blocks.ON_HOST, blocks.AGAIN)
    ]
    assert blocks.AGAIN.label not in legend_labels(blocks.preemption_timeline({"swap": SWAPPED}, ["c"]))


def test_a_request_that_never_ran_is_away() -> None:
    assert blocks.lives_with_preemption(RECOMPUTED, "nobody") == [timeline.AWAY] * 7


# --- shapes -----------------------------------------------------------------------------------------------------


def test_shapes_flow_downwards_and_a_change_is_framed() -> None:
    columns = {
        "prefill": [("token ids", (1, 12)), ("logits", (1, 1, 2048))],
        "decode": [("token ids", (1, 1)), ("logits", (1, 1, 2048))],
    }
    (ax,) = flow.shape_flow(columns).axes
    at = {t.get_text(): t.get_position()[1] for t in ax.texts if t.get_text()}
    assert at["token ids"] == at["[1, 12]"] == at["[1, 1]"] < at["logits"] == at["[1, 1, 2048]"]
    assert {"prefill", "decode"} <= set(at)
    frames = [to_hex(p.get_edgecolor()) for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert [frame == style.VERMILLION.lower() for frame in frames] == [False, False, True, False]
    with pytest.raises(ValueError, match="different stages"):
        flow.shape_flow({"a": [("x", (1,))], "b": [("y", (1,))]})


# --- notebooks --------------------------------------------------------------------------------------------------


def test_a_table_is_markdown_in_a_notebook_and_aligned_text_elsewhere() -> None:
    table = MarkdownTable(["what", "ms", "share"], [["a|b", 1.5, "12%"], ["c", 20, "3x"]])
    assert table._repr_markdown_().splitlines() == [
        "| what | ms | share |",
        "| :--- | ---: | ---: |",
        "| a\\|b | 1.5 | 12% |",
        "| c | 20 | 3x |",
    ]
    assert repr(table).splitlines() == ["what   ms  share", "a|b   1.5    12%", "c      20     3x"]
    with pytest.raises(ValueError, match="2 cells"):
        MarkdownTable(["a"], [[1, 2]])


def test_progress_counts_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2, 3], "work")) == [1, 2, 3]
    bar = progress(desc="by hand", total=5)
    bar.update(5)
    bar.close()
    shown = capsys.readouterr().err
    assert re.search(r"work: 100%.*3/3", shown)
    assert re.search(r"by hand: 100%.*5/5", shown)
