"""The figures of chapter 8: what is drawn, read back from the figures' own artists. See also `test_viz`."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from folovllm.course.viz import whole
from folovllm.course.viz.style import GREY, SKY, VERMILLION, WHITE
from folovllm.course.viz.whole import Agreement, Box, Held, Layer, Rung, bar_segments
from tests.course.test_viz import check_edges, check_labels, spread_of, texts, y_labels

RUNGS = [
    Rung("M0", spread_of(9.0, 10.0, 11.0)),
    Rung("M1", spread_of(7.0, 8.0, 9.0), spread_of(0.7, 0.8, 0.9)),
    Rung("M2", spread_of(1900.0, 2000.4, 2100.0), spread_of(240.0, 250.0, 260.0)),
]
HELD = [Held("M0", 2**20, 2**20), Held("M2, with a long name", 600 * 2**20, 30 * 2**20)]
ROWS = {
    "M1": [Agreement(3, 3), None, None],
    "M4, blocks of 16": [Agreement(3, 3), Agreement(2, 3, 14), Agreement(3, 3, 1)],
}
HEADERS = [[("room", 1), ("too few", 2)], [("whole", 1), ("64", 1), ("16", 1)]]
COSTS = [(20.0, 5.0, 0.5), (20.0, 5.0, 21.25)]
LAYERS = [
    Layer("Interface", "text", [[Box("LLM", "entrypoints/llm.py", (1, 8), 0)]], "ids go down", "ids come up"),
    Layer("Runtime", "who runs", [[Box("Scheduler", "scheduler/scheduler.py", (3,), 1)], [Box("Runner", "r.py")]]),
]
FIGURES: dict[str, Callable[[], Figure]] = {
    "speed_waterfall": lambda: whole.speed_waterfall(
        {"w3": RUNGS, "another": RUNGS[::-1]}, {"w3": {"hf:static": spread_of(1.0, 900.0, 999.0)}}, title="Speed"
    ),
    "memory_waterfall": lambda: whole.memory_waterfall({"w3": HELD, "another": HELD}, title="Memory"),
    "same_token_matrix": lambda: whole.same_token_matrix(ROWS, HEADERS, title="Who says the same"),
    "step_costs": lambda: whole.step_costs({"a budget": COSTS, "by cost": COSTS[:1]}, 42.0, title="Steps"),
    "layer_map": lambda: whole.layer_map(LAYERS, title="Layers"),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


@every_figure
def test_nothing_is_clipped_and_every_label_can_be_read(name: str) -> None:
    figure = FIGURES[name]()
    check_edges(figure, sideways=0.02)
    check_labels(figure)


# --- speed --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=8))
def test_the_segments_of_a_bar_lie_end_to_end_and_reach_its_value(values: list[float]) -> None:
    for index, segments in enumerate(bar_segments(values)):
        gains = [segment for segment in segments if segment.of is not None]
        assert [segment.start for segment in gains] == [0.0, *(segment.end for segment in gains[:-1])]
        assert gains[-1].end == pytest.approx(values[index])
        owners = [segment.of for segment in gains if segment.of is not None]
        assert owners == sorted(set(owners)) and owners[-1] <= index
        if index and values[index] > values[index - 1]:
            assert owners[-1] == index and gains[-1].start == pytest.approx(values[index - 1])
        lost = [segment for segment in segments if segment.of is None]
        assert [(s.start, s.end) for s in lost] == (
            [(values[index], values[index - 1])] if index and values[index] < values[index - 1] else []
        )


def bars(ax: Axes, row: int) -> list[tuple[str, float, float]]:
    """Label, start and end of each segment of a row's bar."""
    found = []
    for container in ax.containers:
        for patch in container.patches:  # type: ignore[attr-defined]
            if abs(patch.get_y() + patch.get_height() / 2 - row) < 1e-9:
                found.append((str(container.get_label()), patch.get_x(), patch.get_x() + patch.get_width()))
    return found


def test_a_bar_shows_what_each_rung_added_and_what_was_lost() -> None:
    figure = whole.speed_waterfall({"w3": RUNGS}, {"w3": {"hf:static": spread_of(1.0, 900.0, 999.0)}})
    (ax,) = figure.axes
    assert y_labels(ax) == ["M0", "M1", "M2"]
    assert bars(ax, 0) == [("M0", 0, 10)]
    assert bars(ax, 1) == [("M0", 0, 8), ("lost", 8, 10)]
    assert bars(ax, 2) == [("M0", 0, 8), ("M2", 8, pytest.approx(2000.4))]
    notes = [text for text in texts(ax) if text]
    assert "10.0" in notes and "8.00   x 0.80" in notes and "2,000   x 250.00" in notes
    assert "x 200.0 in all" in notes and "hf:static" in notes
    (peer,) = [line for line in ax.lines if line.get_label() == "peer: hf:static"]
    assert list(peer.get_xdata()) == [900.0, 900.0]


def test_rungs_can_be_told_apart_by_colour_and_hatch() -> None:
    looks = [whole.rung_look(index) for index in range(7)]
    assert looks[0] == (GREY, "") and len(set(looks)) == 7


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,230"), (123.4, "123"), (99.96, "100"), (45.678, "45.7"), (17.0, "17.0"), (0.789, "0.789")],
)
def test_numbers_have_three_digits_that_matter(value: float, shown: str) -> None:
    assert whole.short_number(value) == shown


# --- memory -------------------------------------------------------------------------------------------------------


def test_what_is_used_lies_inside_of_what_is_set_aside() -> None:
    (ax,) = whole.memory_waterfall({"w3": HELD}).axes
    for row, held in enumerate(HELD):
        assert bars(ax, row) == [
            ("reserved", 0, held.reserved / 2**20),
            ("used", 0, held.used / 2**20),
        ]
    assert "1.00 MiB, 100% used" in texts(ax) and "600 MiB, 5% used" in texts(ax)


# --- who agrees ---------------------------------------------------------------------------------------------------


def test_a_cell_is_red_where_somebody_says_something_else() -> None:
    (ax,) = whole.same_token_matrix(ROWS, HEADERS).axes
    cells = {(int(p.get_x()), int(p.get_y())): p for p in ax.patches if isinstance(p, Rectangle)}
    assert set(cells) == {(column, row) for row in range(2) for column in range(3)}
    colors = {place: mpl.colors.to_hex(patch.get_facecolor()).upper() for place, patch in cells.items()}
    assert colors == {
        **{(0, 0): SKY, (1, 0): WHITE, (2, 0): WHITE},
        **{(0, 1): SKY, (1, 1): VERMILLION, (2, 1): SKY},
    }
    assert cells[1, 0].get_hatch() and not cells[0, 0].get_hatch()
    assert {"3/3", "2/3\n(14)", "3/3\n(1)", "too few", "64"} <= set(texts(ax))
    assert y_labels(ax) == list(ROWS)


def test_a_row_or_a_header_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\['b'\] has 1 cells; allowed: 2"):
        whole.same_token_matrix({"a": [None, None], "b": [None]}, [])
    with pytest.raises(ValueError, match="headers has a line of 3 columns; allowed: 2"):
        whole.same_token_matrix({"a": [None, None]}, [[("x", 3)]])


# --- what a step costs --------------------------------------------------------------------------------------------


def test_the_parts_of_a_step_stand_on_each_other_under_one_target() -> None:
    first, second = whole.step_costs({"a budget": COSTS, "by cost": COSTS[:1]}, 42.0).axes
    stacks = {str(c.get_label()): [(p.get_y(), p.get_height()) for p in c.patches] for c in first.containers}  # type: ignore[attr-defined]
    assert list(stacks) == ["fixed", "per token", "per query-key pair"]
    for step, parts in enumerate(COSTS):
        assert [stacks[label][step] for label in stacks] == [(0, parts[0]), (20, parts[1]), (25, parts[2])]
    assert [ax.get_title(loc="left") for ax in (first, second)] == [
        "a budget: 2 steps, 72 ms",
        "by cost: 1 steps, 26 ms",
    ]
    for ax in (first, second):
        (target,) = [line for line in ax.lines if line.get_label() == "target"]
        assert set(target.get_ydata()) == {42.0}  # type: ignore[arg-type]


# --- three layers -------------------------------------------------------------------------------------------------


def test_a_map_has_every_box_in_its_band_and_every_stop_in_its_box() -> None:
    (ax,) = whole.layer_map(LAYERS).axes
    bands = [p for p in ax.patches if isinstance(p, Rectangle)]
    boxes = [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert (len(bands), len(boxes)) == (2, 3)
    for box in boxes:
        inside = [band.get_y() < box.get_y() and box.get_y() + box.get_height() < band.get_y() + band.get_height()
                  for band in bands]  # fmt: skip
        assert sum(inside) == 1
    stops = [line for line in ax.lines if line.get_label() == "stop"]
    places = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in stops]  # type: ignore[index]
    assert len(places) == 3
    for x, y in places:
        assert any(
            b.get_x() < x < b.get_x() + b.get_width() and b.get_y() < y < b.get_y() + b.get_height() for b in boxes
        )
    assert {"1", "8", "3", "LLM", "scheduler/scheduler.py", "ids go down", "ids come up", "Runtime"} <= set(texts(ax))
