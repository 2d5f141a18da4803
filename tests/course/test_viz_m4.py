"""The figures of chapters 6 and 7: what is drawn, read back from the figures' own artists. See also `test_viz`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from folovllm.course.viz import chunks, prefix
from folovllm.course.viz.prefix import hit_tokens
from folovllm.engine.trace import RequestStep, StepTrace
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockSnapshot, KVUsage
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from tests.course.test_viz import (
    cells,
    check_edges,
    check_labels,
    legend_labels,
    line,
    marks,
    spread_of,
    texts,
    x_labels,
    y_labels,
)


def a_step(
    number: int,
    shares: dict[str, tuple[int, int, int, int, int]],
    budget: int = 16,
    blocks: BlockSnapshot | None = None,
) -> StepTrace:
    """A step of `shares`: request -> (tokens computed, of the prompt, found, K/V after it, tokens sampled)."""
    requests = [RequestStep(i, n, p, c, k, 0, s, "RUNNING") for i, (n, p, c, k, s) in shares.items()]
    return StepTrace(number, {}, requests, 0, len(shares), budget, 1, 0, KVUsage(99, 9, 9), blocks=blocks)


# "a" decodes; "b" has a prompt of 20 in two chunks; "c" finds 8 of its 10; "d" computes three tokens again.
MIXED = [
    a_step(4, {"a": (1, 0, 0, 6, 1), "b": (15, 15, 0, 15, 0)}),
    a_step(5, {"a": (1, 0, 0, 7, 1), "b": (5, 5, 0, 20, 1), "c": (2, 2, 8, 10, 1)}),
    a_step(6, {"a": (1, 0, 0, 8, 1), "b": (1, 0, 0, 21, 1), "c": (1, 0, 0, 11, 1), "d": (3, 0, 0, 9, 1)}),
]


def snapshot(free: tuple[int, ...], cached: dict[int, int | None], tables: dict[str, tuple[int, ...]]) -> BlockSnapshot:
    """Five blocks of two slots."""
    counts = tuple(sum(table.count(block) for table in tables.values()) for block in range(6))
    return BlockSnapshot(2, tables, {}, counts, tuple(2 * (n > 0) for n in counts), len(free), free, cached)


# "a" fills blocks 1 and 2 and goes. "b" finds block 1, takes 3. "c" takes the whole line: 4, 5, and 2, which is lost.
LINE = [
    a_step(0, {"a": (4, 4, 0, 4, 1)}, blocks=snapshot((3, 4, 5), {1: None, 2: 1}, {"a": (1, 2)})),
    a_step(1, {"a": (1, 0, 0, 5, 1)}, blocks=snapshot((3, 4, 5, 2, 1), {1: None, 2: 1}, {})),
    a_step(2, {"b": (2, 2, 2, 4, 1)}, blocks=snapshot((4, 5, 2), {1: None, 2: 1, 3: 1}, {"b": (1, 3)})),
    a_step(3, {"b": (1, 0, 0, 5, 1)}, blocks=snapshot((4, 5, 2, 3, 1), {1: None, 2: 1, 3: 1}, {})),
    a_step(4, {"c": (6, 6, 0, 6, 1)}, blocks=snapshot((3, 1), {1: None, 3: 1, 4: None, 5: 4, 2: 5}, {"c": (4, 5, 2)})),
]
TREE = BlockSnapshot(
    2,
    {"x": (1, 2, 4), "y": (1, 3), "z": (5,)},
    {},
    (0, 2, 1, 1, 1, 1),
    (0, 2, 2, 2, 1, 1),
    0,
    (),
    {1: None, 2: 1, 3: 1},
)
WORDS = {1: "the cat", 2: "sat on", 3: "ate the"}
TAILS = {"x": "a", "z": "dog"}
SPREADS = [spread_of(0.1, 0.2, 0.3), spread_of(0.2, 0.4, 0.9), spread_of(0.8, 0.9, 1.0)]

FIGURES: dict[str, Callable[[], Figure]] = {
    "chunked_mask": lambda: chunks.chunked_mask([4, 3], title="A mask"),
    "chunked_mask, many": lambda: chunks.chunked_mask([7] * 4),
    "step_composition": lambda: chunks.step_composition(
        {"mixed": chunks.composition(MIXED), "a budget in words": chunks.Composition(4096, [1], [9], [0], [1])},
        title="S",
    ),
    "latency_by_chunk": lambda: chunks.latency_by_chunk(
        [64, 256, 2048], {"ITL": {"p50": SPREADS, "p95": SPREADS}, "TTFT": {"p50": SPREADS[::-1]}}, labels={2048: "all"}
    ),
    "hash_tree": lambda: prefix.hash_tree(TREE, WORDS, TAILS, title="Blocks"),
    "hit_rate_by_prefix": lambda: prefix.hit_rate_by_prefix([0, 16, 64], {16: [0.0, 0.2, 0.7]}, 64, 20, title="Hits"),
    "lru_order": lambda: prefix.lru_order(LINE, labels={"a": "first"}, title="The line"),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


@every_figure
def test_nothing_is_clipped_and_every_label_can_be_read(name: str) -> None:
    figure = FIGURES[name]()
    check_edges(figure, sideways=0.02)
    check_labels(figure)


# --- chunks -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_the_rectangles_of_chunks_are_the_rows_of_the_triangle(sizes: list[int]) -> None:
    triangle = np.tril(np.ones((sum(sizes), sum(sizes)), dtype=bool))
    rectangles = chunks.chunk_masks(sizes)
    assert [rectangle.shape[0] for rectangle in rectangles] == sizes
    start = 0
    for rectangle in rectangles:
        queries, keys = rectangle.shape
        assert keys == start + queries
        assert ((rectangle > 0) == triangle[start:keys, :keys]).all()
        assert not triangle[start:keys, keys:].any()  # nothing is cut off
        assert (rectangle[:, :start] == 2).all() and (rectangle[:, start:] < 2).all()
        start = keys


@pytest.mark.parametrize("sizes", [[], [3, 0], [-1]])
def test_a_chunk_has_a_token(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"chunks=.* allowed: at least one, each of at least 1 token"):
        chunks.chunk_masks(sizes)


def test_a_mask_stands_whole_beside_its_pieces() -> None:
    figure = chunks.chunked_mask([4, 3], title="A mask")
    # The pieces were there first: the left axes are added where two were.
    first, second, whole = figure.axes
    assert cells(whole).tolist() == np.tril(np.ones((7, 7), dtype=int)).tolist()
    assert cells(second).tolist() == [[2, 2, 2, 2, 1, 0, 0], [2, 2, 2, 2, 1, 1, 0], [2, 2, 2, 2, 1, 1, 1]]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["pass 1: [4, 4]", "pass 2: [3, 7]", "one pass: [7, 7]"]
    assert y_labels(second) == ["4", "5", "6"]
    assert len(marks(second, chunks.CACHED.label)) == 12 and len(marks(first, chunks.OF_THIS_PASS.label)) == 10
    assert first.get_xlim() == second.get_xlim() == (-0.5, 6.5)  # a cell is as wide everywhere
    cuts = [float(np.asarray(cut.get_ydata())[0]) for cut in whole.lines if cut.get_linestyle() == "--"]
    assert cuts == [3.5]


def test_a_step_is_decodes_prompts_and_what_was_found() -> None:
    filled = chunks.composition(MIXED)
    assert filled == chunks.Composition(
        budget=16, decodes=[1, 1, 3], prefills=[15, 7, 3], cached=[0, 8, 0], complete=[0, 2, 0]
    )


def bars(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    """Label -> (bottom, height) of each bar."""
    return {
        str(container.get_label()): [(bar.get_y(), bar.get_height()) for bar in container]
        for container in ax.containers
        if not isinstance(container, ErrorbarContainer)
    }


def test_bars_of_steps_stack_to_the_budget() -> None:
    figure = FIGURES["step_composition"]()
    mixed, words = figure.axes
    assert bars(mixed) == {
        "decode": [(0, 1), (0, 1), (0, 3)],
        "prefill": [(1, 15), (1, 7), (3, 3)],
        "cached": [(16, 0), (8, 8), (6, 0)],
    }
    assert line(mixed, "budget")[1].tolist() == [16, 16]
    assert line(mixed, "complete")[0].tolist() == [1]
    assert mixed.get_title(loc="left") == "mixed: 3 steps"
    assert words.get_title(loc="left") == "a budget in words: 1 step, budget 4,096"
    assert [found for found in words.lines if found.get_label() == "budget"] == []
    assert legend_labels(figure)[2] == "prompt tokens found in the cache"
    assert chunks.LOOKS["cached"][0] not in legend_labels(
        chunks.step_composition({"x": chunks.Composition(8, [1], [7], [0], [1])})
    )


def test_one_scale_of_tokens_for_all_panels() -> None:
    runs = {"low": chunks.Composition(16, [1], [3], [0], [1]), "high": chunks.Composition(16, [1], [15], [40], [1])}
    assert len({ax.get_ylim() for ax in chunks.step_composition(runs, share_scale=True).axes}) == 1
    assert len({ax.get_ylim() for ax in chunks.step_composition(runs).axes}) == 2


def test_latencies_are_medians_in_milliseconds_with_their_ends() -> None:
    itl, ttft = FIGURES["latency_by_chunk"]().axes
    for ax, name, expected in ((itl, "p95", [200, 400, 900]), (ttft, "p50", [900, 400, 200])):
        (drawn,) = [c for c in ax.containers if c.get_label() == name]
        data, _, (ends,) = drawn.lines
        assert np.asarray(data.get_ydata(), dtype=float).tolist() == pytest.approx(expected)
        assert sorted(ends.get_segments()[1][:, 1]) == pytest.approx([200, 900])
    assert x_labels(itl) == ["64", "256", "all"]
    assert itl.get_ylim()[0] == 0 and itl.get_ylim()[1] > 1000  # room for the legend


# --- prefixes -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 17))
def test_the_formula_says_what_a_real_cache_finds(shared: int, prompt_len: int, block_size: int) -> None:
    shared = min(shared, prompt_len)
    books = BlockManager(200, block_size, cache=PrefixCache(block_size))
    common = list(range(shared))
    first = Request("first", [*common, *[100] * (prompt_len - shared)], SamplingParams(), (), max_model_len=99)
    plan = books.allocate_slots(first, prompt_len)
    assert plan is not None
    books.cache_blocks(plan)
    second = Request("second", [*common, *[200] * (prompt_len - shared)], SamplingParams(), (), max_model_len=99)
    assert books.get_computed_blocks(second) == hit_tokens(shared, prompt_len, block_size)


def boxes(ax: Axes) -> dict[str, Rectangle]:
    """The boxes of a tree, by the text in them."""
    found = {}
    for patch in ax.patches:
        assert isinstance(patch, Rectangle)
        inside = [
            t.get_text()
            for t in ax.texts
            if patch.get_x() < t.get_position()[0] < patch.get_x() + patch.get_width()
            and patch.get_y() < t.get_position()[1] < patch.get_y() + patch.get_height()
        ]
        assert len(inside) == 1
        found[inside[0]] = patch
    return found


def test_a_tree_has_a_line_from_each_block_to_the_one_before() -> None:
    (ax,) = FIGURES["hash_tree"]().axes
    drawn = boxes(ax)
    assert set(drawn) == {*WORDS.values(), *TAILS.values()}
    assert {text: box.get_linestyle() for text, box in drawn.items()} == {
        **dict.fromkeys(WORDS.values(), "-"),
        **dict.fromkeys(TAILS.values(), ":"),
    }

    def level(text: str) -> float:
        return float(drawn[text].get_y() + drawn[text].get_height() / 2)

    root = next(t.get_position()[1] for t in ax.texts if t.get_text() == "secret")
    ends = {(float(ys[0]), float(ys[-1])) for ys in (np.asarray(chain.get_ydata()) for chain in ax.lines)}
    # "x" ends behind its last full block; "z" has none, so its tail hangs on the root.
    assert ends == {
        (root, level("the cat")),
        (level("the cat"), level("sat on")),
        (level("the cat"), level("ate the")),
        (level("sat on"), level("a")),
        (root, level("dog")),
    }
    depth = {text: round(box.get_x(), 6) for text, box in drawn.items()}
    assert depth["the cat"] == depth["dog"] < depth["sat on"] == depth["ate the"] < depth["a"]
    captions = texts(ax)
    assert {"block 1, ref 2", "block 2, ref 1", "x, no key", "z, no key"} <= set(captions)
    assert [t.get_text() for t in ax.texts if t.get_weight() == "bold"] == ["block 1, ref 2"]


def test_a_block_that_nobody_holds_is_free_in_the_tree() -> None:
    (ax,) = prefix.hash_tree(snapshot((1, 2), {1: None}, {}), {1: "the cat"}).axes
    assert texts(ax) == ["secret", "the cat", "block 1, free"]


def test_hit_rates_are_drawn_over_their_formula() -> None:
    (ax,) = prefix.hit_rate_by_prefix([0, 16, 64], {16: [0.0, 0.2375, 0.7125]}, 64, 20).axes
    x, y = line(ax, "_formula")
    at = dict(zip(x.tolist(), y.tolist(), strict=True))
    assert [at[n] for n in (0, 15, 16, 31, 32, 63, 64)] == pytest.approx([0, 0, 23.75, 23.75, 47.5, 71.25, 71.25])
    assert line(ax, "blocks of 16")[1].tolist() == pytest.approx([0, 23.75, 71.25])
    most = line(ax, "every shared token")[1]
    assert most[-1] == most[-2] == pytest.approx(100 * 19 * 63 / (20 * 64))
    assert (most >= y).all()


def test_the_line_shows_who_filled_what_and_what_is_lost() -> None:
    figure = FIGURES["lru_order"]()
    (ax,) = figure.axes
    # 0 is free and empty, 1 to 3 are a, b and c, 4 is held; a column per step.
    assert cells(ax).T.tolist() == [
        [0, 0, 0, 4, 4],
        [0, 0, 0, 1, 1],
        [0, 0, 1, 4, 4],
        [0, 0, 1, 2, 1],
        [2, 1, 4, 4, 4],
    ]
    in_cells = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in ax.texts}
    assert [in_cells[3, place] for place in (2, 3, 4)] == ["first1", "b1", "first0"]  # b found the first block of a
    (triangle,) = [c for c in ax.collections if c.get_label() == "evicted"]
    assert np.asarray(triangle.get_offsets())[:, 0].tolist() == [4]
    assert [t.get_text() for t in ax.texts if isinstance(t, Annotation)] == ["first1"]
    assert legend_labels(figure) == ["first", "b", "c", prefix.HELD.label, prefix.EMPTY.label]


def test_a_block_that_is_found_keeps_the_name_of_who_filled_it() -> None:
    fillers = prefix.block_fillers(LINE)
    assert fillers[0] == {1: ("a", 0), 2: ("a", 1)}
    assert fillers[2] == {1: ("a", 0), 2: ("a", 1), 3: ("b", 1)}
    assert fillers[4] == {1: ("a", 0), 2: ("c", 2), 3: ("b", 1), 4: ("c", 0), 5: ("c", 1)}
    assert prefix.lost_blocks(LINE) == [[], [], [], [], [2]]


def test_the_line_agrees_with_a_plain_model_of_lru() -> None:
    # The oracle is a list of names, the next to be taken first; what is drawn is read from the engine's books.
    rng = np.random.default_rng(3)
    books = BlockManager(8, 2, cache=PrefixCache(2))
    line: list[tuple[str, int] | None] = [None] * 8
    names: dict[tuple[int, ...], tuple[str, int]] = {}  # what is cached, by its text from the beginning
    steps: list[StepTrace] = []
    lines, lost = [], []
    for number in range(60):
        prompt = [int(rng.integers(2)) for _ in range(5)]  # two full blocks, and a third that is not
        request = Request(str(number), prompt, SamplingParams(), (), max_model_len=99)
        found = books.get_computed_blocks(request)
        plan = books.allocate_slots(request, len(prompt) - found)
        assert plan is not None
        books.cache_blocks(plan)
        shares = {request.request_id: (len(prompt) - found, len(prompt) - found, found, len(prompt), 1)}
        steps.append(a_step(2 * number, shares, blocks=books.snapshot()))
        books.free(request)
        steps.append(a_step(2 * number + 1, {}, blocks=books.snapshot()))

        starts = [tuple(prompt[:2]), tuple(prompt[:4])]
        hits = [names[start] for start in starts if start in names]
        assert found == 2 * len(hits)
        line = [name for name in line if name not in hits]
        taken, line = line[: 3 - len(hits)], line[3 - len(hits) :]
        lost += [[name for name in taken if name is not None], []]
        names = {start: name for start, name in names.items() if name not in taken}
        names |= {start: (str(number), i) for i, start in enumerate(starts) if start not in names}
        lines.append(line)
        line = [*line, None, *(names[start] for start in reversed(starts))]
        lines.append(line)
    fillers = prefix.block_fillers(steps)
    for column, step in enumerate(steps):
        assert step.blocks is not None
        drawn = [fillers[column][b] if b in step.blocks.cached else None for b in step.blocks.free]
        assert drawn == lines[column]
        gone = [fillers[column - 1][b] for b in prefix.lost_blocks(steps)[column]]
        assert gone == lost[column]
    assert sum(map(len, lost)) > 20


def test_the_line_cannot_be_drawn_without_snapshots() -> None:
    with pytest.raises(ValueError, match="trace_blocks=True"):
        prefix.lru_order(MIXED)
