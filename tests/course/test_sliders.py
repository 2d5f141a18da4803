"""Figures with a slider: a panel per value where nothing runs, and a slider that draws what it is moved to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from folovllm.course.lessons.fragmentation import draw_requests, replay
from folovllm.course.viz import panels, sliders
from folovllm.course.viz.sliders import SliderFigure, slider_figure, spread_evenly
from tests.needs import need_module

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PNG = b"\x89PNG"


def height_of(ax: Axes, value: int) -> str:
    ax.bar([0], [value], label="a bar")
    return f"{value} high"


def example(**changes: Any) -> SliderFigure:
    return slider_figure(**{"draw": height_of, "name": "height", "values": range(1, 11)} | changes)


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLOVLLM_STATIC", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)


def heights(figure: Figure) -> list[float]:
    return [ax.patches[0].get_height() for ax in figure.axes]  # type: ignore[attr-defined]


# --- the picture ------------------------------------------------------------------------------------------


def test_the_picture_has_a_panel_for_each_value_that_is_shown() -> None:
    figure = example(shown=(2, 5, 9)).small_multiples()
    assert heights(figure) == [2, 5, 9]
    assert [ax.get_title(loc="left") for ax in figure.axes] == [f"height {n}: {n} high" for n in (2, 5, 9)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a bar"]


def test_without_a_choice_four_values_are_shown_from_the_first_to_the_last() -> None:
    assert heights(example().small_multiples()) == [1, 4, 7, 10]
    assert spread_evenly((8, 16), 4) == [8, 16]
    assert spread_evenly(range(65), 4) == [0, 21, 43, 64]


def test_panels_stand_in_columns_and_are_equally_large() -> None:
    figure = example(shown=(1, 2, 3), columns=2, title="T").small_multiples()
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    boxes = [ax.get_position() for ax in figure.axes]
    assert [bool(box.x0 > 0.5) for box in boxes] == [False, True, False] and boxes[2].y1 < boxes[0].y0
    assert len({(round(box.width, 3), round(box.height, 3)) for box in boxes}) == 1


@pytest.mark.parametrize("settings", [{}, {"FOLOVLLM_STATIC": "1", "JPY_SESSION_NAME": "a.ipynb"}])
def test_where_no_widget_runs_the_output_is_a_picture(
    nobody_looks: None, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", mpl)  # as in a kernel
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    data, metadata = example()._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"}
    assert data["image/png"].startswith(PNG) and metadata["image/png"]["width"] == 700
    assert data["text/plain"] == "<figure with a slider: height from 1 to 10>"


def test_widgets_need_a_kernel_ipywidgets_and_a_front_end(nobody_looks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.setattr(sliders, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert not sliders.runs_widgets()  # no kernel
    monkeypatch.setitem(sys.modules, "ipykernel", mpl)
    assert sliders.runs_widgets()
    monkeypatch.setattr(sliders, "find_spec", lambda name: None)
    assert not sliders.runs_widgets()  # not installed
    monkeypatch.setattr(sliders, "find_spec", lambda name: object())
    monkeypatch.delenv("JPY_SESSION_NAME")
    monkeypatch.setattr(sliders, "_has_front_end", lambda: False)
    assert not sliders.runs_widgets()  # nobody looks
    monkeypatch.setenv("FOLOVLLM_STATIC", "0")
    assert sliders.runs_widgets()  # whoever says so
    monkeypatch.setenv("FOLOVLLM_STATIC", "yes")
    with pytest.raises(ValueError, match="FOLOVLLM_STATIC='yes' is not valid; allowed: 0"):
        sliders.runs_widgets()


@pytest.mark.parametrize(
    "wrong",
    [{"values": [3]}, {"start": 11}, {"shown": (1, 12)}, {"shown": ()}],
    ids=["one value", "start", "shown", "nothing shown"],
)
def test_values_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        example(**wrong)


# --- the slider -------------------------------------------------------------------------------------------


@need_module("ipywidgets")
def test_the_slider_draws_what_it_is_moved_to_and_each_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(ax: Axes, value: int) -> str:
        drawn.append(value)
        return height_of(ax, value)

    slider, image = example(draw=draw, start=4).widget().children
    assert (slider.description, slider.value, drawn) == ("height", 4, [4])
    assert [label for label, _ in slider.options] == [str(n) for n in range(1, 11)]
    at_four = bytes(image.value)
    assert at_four.startswith(PNG)
    slider.value = 9
    assert drawn == [4, 9] and bytes(image.value) != at_four
    slider.value = 4
    assert drawn == [4, 9] and bytes(image.value) == at_four


@need_module("ipywidgets")
def test_a_reader_gets_the_slider_and_a_saved_notebook_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliders, "runs_widgets", lambda: True)
    data, _ = example()._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png", WIDGET_VIEW}
    assert data["image/png"].startswith(PNG) and data[WIDGET_VIEW]["model_id"]


# --- the panels of the labs -------------------------------------------------------------------------------

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])
RUNS = {size: replay(draw_requests(40, seed=1), "paged", block_size=size) for size in (1, 16, 256)}
PANELS: dict[str, tuple[Callable[[Axes, Any], str], list[Any], dict[str, Any]]] = {
    "sampled": (
        lambda ax, kept: panels.sampled_panel(
            ax, PROBABILITIES, np.where(np.arange(4) < kept, PROBABILITIES, 0), ["_a", "_b", "_long_token", "."]
        ),
        [1, 2, 3, 4],
        {},
    ),
    "static step": (
        lambda ax, step: panels.static_step_panel(ax, [4, 2, 3], [1, 5, 3], step),
        [0, 1, 2, 4],
        {"height": 1.25, "columns": 1, "kinds": panels.STEP_KINDS},
    ),
    "held slots": (lambda ax, size: panels.held_slots_panel(ax, RUNS[size], 2000), list(RUNS), {}),
    "chunk rows": (
        lambda ax, size: panels.chunk_rows_panel(ax, 12, size),
        [1, 4, 5, 12],
        {"height": 2.6, "kinds": panels.CHUNK_KINDS},
    ),
    "reuse": (
        lambda ax, shared: panels.reuse_panel(ax, shared, 64, (4, 16, 32)),
        [0, 31, 32, 64],
        {"height": 1.35, "columns": 1, "kinds": panels.REUSE_KINDS},
    ),
}
each_panel = pytest.mark.parametrize("name", PANELS)


def panel_figure(name: str) -> SliderFigure:
    draw, values, settings = PANELS[name]
    return slider_figure(draw, name=name, values=values, title="A title", **settings)


@each_panel
def test_nothing_is_clipped_and_everything_can_be_read(name: str) -> None:
    slider = panel_figure(name)
    for figure in (slider.small_multiples(), slider.panel(slider.start)):
        FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert width == 7.0
        assert box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01
        labels = [t for t in figure.findobj(mpl.text.Text) if t.get_text().strip() and t.get_visible()]
        assert min(t.get_fontsize() for t in labels) >= 7.5


@each_panel
def test_panels_can_be_compared(name: str) -> None:
    limits = {(ax.get_xlim(), ax.get_ylim()) for ax in panel_figure(name).small_multiples().axes}
    assert len(limits) == 1


def note_of(name: str, value: Any) -> str:
    return panel_figure(name).panel(value).axes[0].get_title(loc="left").partition(": ")[2]


def grid_of(name: str, value: Any) -> np.ndarray:
    return np.asarray(panel_figure(name).panel(value).axes[0].images[0].get_array())


def test_a_sampled_panel_crosses_out_what_was_dropped() -> None:
    ax = panel_figure("sampled").panel(3).axes[0]
    (crosses,) = [line for line in ax.lines if line.get_label() == "dropped"]
    assert list(crosses.get_xdata()) == [3]
    assert [round(patch.get_height(), 3) for patch in ax.patches] == [0.4, 0.3, 0.2, 0, 0.4, 0.3, 0.2, 0.1]
    assert [note_of("sampled", n) for n in (1, 2)] == ["1 token left", "2 tokens left"]


def test_a_step_of_a_static_batch_is_needed_padded_done_or_not_there_yet() -> None:
    assert grid_of("static step", 0).tolist() == [
        [0, 0, 0, 0, 3, 3, 3, 3],
        [1, 1, 0, 0, 3, 3, 3, 3],
        [1, 0, 0, 0, 3, 3, 3, 3],
    ]
    assert grid_of("static step", 4).tolist() == [[2] * 8, [1, 1, 0, 0, 0, 0, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]]
    assert note_of("static step", 0) == "9 of 12 cells are needed, 75%"
    assert note_of("static step", 4) == "6 of 24 cells are needed, 25%"


def test_held_slots_say_what_is_empty() -> None:
    assert note_of("held slots", 1).startswith("0.0% empty")
    ax = panel_figure("held slots").panel(256).axes[0]
    held, written = (patch.get_data().values for patch in ax.patches)  # type: ignore[attr-defined]
    assert all(int(x) % 256 == 0 for x in held) and (written <= held).all()
    empty = 1 - written.sum() / held.sum()
    assert empty > 0.05 and note_of("held slots", 256).startswith(f"{empty:.1%} empty")


@pytest.mark.parametrize(("size", "passes", "read"), [(12, "1 pass", 0), (4, "3 passes", 4 + 8), (1, "12 passes", 66)])
def test_chunks_lie_below_each_other_in_one_triangle(size: int, passes: str, read: int) -> None:
    grid = grid_of("chunk rows", size) if size != 4 else grid_of("chunk rows", 4)
    assert ((grid > 0) == np.tri(12, dtype=bool)).all()
    queries, keys = np.nonzero(grid == 2)  # from the cache: in an earlier chunk than the query
    assert (keys // size < queries // size).all()
    assert note_of("chunk rows", size) == f"{passes}, {read} from the cache"


def test_reuse_is_whole_blocks_and_never_everything() -> None:
    for shared, found in ((0, [0, 0, 0]), (31, [28, 16, 0]), (32, [32, 32, 32]), (64, [60, 48, 32])):
        grid = grid_of("reuse", shared)
        assert [int((row == 0).sum()) for row in grid] == found
        assert [int((row == 1).sum()) for row in grid] == [shared - n for n in found]
        labels = [t.get_text() for t in panel_figure("reuse").panel(shared).axes[0].get_yticklabels()]
        assert labels == [f"{size}: {n} hit" for size, n in zip((4, 16, 32), found, strict=True)]
