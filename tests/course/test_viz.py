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
from matplotlib.patches import FancyBboxPatch, Rectangle
from transformers import LlamaConfig

from folovllm.engine.trace import PHASES, RequestStep, StepTrace
from folovllm.kv_cache.formulas import (
    attention_flops_per_token,
    linear_flops_per_token,
    linear_tokens_cached,
    linear_tokens_recompute,
)
from folovllm.kv_cache.interface import KVUsage
from folovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from folovllm.viz import flow, kv, masks, roofline, sampling, style, timeline
from folovllm.viz.notebook import MarkdownTable, progress

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
}  # fmt: skip
every_figure = pytest.mark.parametrize("name", FIGURES)


@every_figure
def test_nothing_is_clipped_at_the_width_of_a_page(name: str) -> None:
    figure = FIGURES[name]()
    width, height = figure.get_size_inches()
    assert width == 7.0
    FigureCanvasAgg(figure).draw()
    box = figure.get_tightbbox()
    assert box.x0 > -0.01 and box.y0 > -0.01
    assert box.x1 < width + 0.01 and box.y1 < height + 0.01


@every_figure
def test_every_label_can_be_read(name: str) -> None:
    figure = FIGURES[name]()
    labels = [t for t in figure.findobj(mpl.text.Text) if t.get_text().strip() and t.get_visible()]
    assert labels
    assert min(t.get_fontsize() for t in labels) >= 7.5  # more than 10 pixels


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
        (kv.ABSENT, kv.REUSED, kv.COMPUTED),
        (timeline.WAITING, timeline.PREFILL, timeline.DECODE),
        (sampling.EQUAL, sampling.DIFFERENT, sampling.NOTHING),
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
