"""Figures with a slider: one panel that follows it in a running notebook, small multiples wherever no widget runs.

The same drawing function serves both::

    a running notebook                            a page, GitHub, a notebook that was run without a reader

    temperature  |-------o------|  1.0            temperature 0.5     temperature 1.0
    +------------------------------+              +-------------+     +-------------+
    |  the panel for 1.0           |              |             |     |             |
    +------------------------------+              +-------------+     +-------------+
                                                  temperature 1.5     temperature 2.0
                                                  +-------------+     +-------------+
                                                  |             |     |             |
                                                  +-------------+     +-------------+

Whether widgets run, `runs_widgets` decides. In the end the environment does: `FOLOVLLM_STATIC=1` is never a slider,
`FOLOVLLM_STATIC=0` one in every notebook that has ipywidgets. A picture is always part of the output, so a notebook
that was saved with a slider in it still shows something where the slider is dead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folovllm.course.viz.style import PIXELS_PER_INCH, WIDTH, CourseFigure, Kind, legend_of_kinds, new_figure, styled

Draw = Callable[[Axes, Any], str]
MOST_PANELS = 4  # of the small multiples, where nobody says which
STATIC = "FOLOVLLM_STATIC"


@dataclass(eq=False, repr=False)
class SliderFigure:
    """A drawing over the values of one parameter; a cell that ends in it shows it. `slider_figure` makes one."""

    draw: Draw
    name: str
    values: Sequence[Any]
    start: Any
    shown: Sequence[Any]
    height: float
    columns: int
    kinds: Sequence[Kind]
    title: str | None
    _pictures: dict[int, bytes] = field(default_factory=dict, init=False)  # place in `values` -> PNG

    @styled
    def panel(self, value: Any) -> Figure:
        """The drawing for one value: what stands under the slider."""
        return self._figure([value], columns=1)

    @styled
    def small_multiples(self) -> Figure:
        """The drawings for the `shown` values side by side, on axes of one size."""
        return self._figure(self.shown, self.columns)

    def picture(self, value: Any) -> bytes:
        """The panel for one value as PNG, drawn once."""
        place = list(self.values).index(value)
        if place not in self._pictures:
            drawn = BytesIO()
            self.panel(value).savefig(drawn, format="png", dpi=2 * PIXELS_PER_INCH)
            self._pictures[place] = drawn.getvalue()
        return self._pictures[place]

    def widget(self) -> Any:
        """The slider above its panel (an ipywidgets `VBox`)."""
        import ipywidgets

        slider = ipywidgets.SelectionSlider(
            options=[(_text(value), value) for value in self.values],
            value=self.start,
            description=self.name,
            style={"description_width": "initial"},
            layout=ipywidgets.Layout(width="100%", max_width=f"{WIDTH * PIXELS_PER_INCH:.0f}px"),
        )
        image = ipywidgets.Image(
            value=self.picture(self.start),
            format="png",
            layout=ipywidgets.Layout(width=f"{WIDTH * PIXELS_PER_INCH:.0f}px", max_width="100%"),
        )

        def follow(change: Any) -> None:
            image.value = self.picture(change["new"])

        slider.observe(follow, names="value")
        return ipywidgets.VBox([slider, image])

    def _figure(self, values: Sequence[Any], columns: int) -> Figure:
        rows = ceil(len(values) / columns)
        height = rows * self.height + 0.3 * (self.title is not None)
        figure, axes = new_figure(height, rows, columns, self.title)
        handles: dict[str, Any] = {}
        for ax, value in zip(axes, values, strict=False):
            note = self.draw(ax, value)
            ax.set_title(f"{self.name} {_text(value)}" + (f": {note}" if note else ""))
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        for ax in axes[len(values) :]:
            ax.remove()
        if self.kinds:
            legend_of_kinds(figure, self.kinds)
        elif handles:
            figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower left", ncols=4)
        return figure

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The picture for everybody, and the slider for those who can move it (IPython's protocol)."""
        picture, size = _png(self.small_multiples())
        data: dict[str, Any] = {"text/plain": repr(self), "image/png": picture}
        if runs_widgets():
            data |= {kind: view for kind, view in self.widget()._repr_mimebundle_().items() if kind not in data}
        return data, {"image/png": size}

    def __repr__(self) -> str:
        return f"<figure with a slider: {self.name} from {_text(self.values[0])} to {_text(self.values[-1])}>"


def slider_figure(
    draw: Draw,
    *,
    name: str,
    values: Sequence[Any],
    start: Any = None,
    shown: Sequence[Any] | None = None,
    height: float = 2.3,
    columns: int = 2,
    kinds: Sequence[Kind] = (),
    title: str | None = None,
) -> SliderFigure:
    """A figure whose panel `draw(axes, value)` follows a slider over `values`.

    draw: draws one panel and returns what its title says after the value, or "". It should be quick (below 0.3
    seconds): compute before, and let it only look up and draw. Everything that it labels goes into one legend; where
    `kinds` are given, the legend names those kinds of cells.
    name: of the parameter. start: where the slider stands first; the middle one of `values` if None. shown: the values
    of the small multiples; up to four, spread evenly from the first to the last, if None. height: of a panel, in
    inches. columns: of the small multiples.

    Raises ValueError for fewer than two values, or a `start` or `shown` that is not among them.
    """
    if len(values) < 2:
        raise ValueError(f"values={list(values)!r}; allowed: at least two, or there is nothing to move")
    if start is None:
        start = values[len(values) // 2]
    shown = spread_evenly(values, MOST_PANELS) if shown is None else shown
    strange = [value for value in (start, *shown) if value not in values]
    if strange or not shown:
        raise ValueError(f"start={start!r}, shown={list(shown)!r}; allowed: some of values={list(values)!r}")
    return SliderFigure(draw, name, values, start, shown, height, columns, kinds, title)


def spread_evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def runs_widgets() -> bool:
    """Whether somebody is there to move a slider: a notebook's kernel, with ipywidgets, and a front end that runs them.

    A kernel cannot ask whether anybody looks. It can see who started it: Jupyter's server (JupyterLab, Notebook), VS
    Code and Colab leave a mark, and a run without a reader (nbconvert, nbclient, pytest) leaves none.
    `FOLOVLLM_STATIC` overrules that. Raises ValueError where it is neither 0 nor 1.
    """
    choice = os.environ.get(STATIC, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{STATIC}={choice!r} is not valid; allowed: 0 (sliders), 1 (pictures only), or not set")
    if choice == "1" or "ipykernel" not in sys.modules or find_spec("ipywidgets") is None:
        return False
    return choice == "0" or _has_front_end()


def _has_front_end() -> bool:
    if "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules:
        return True
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return shell is not None and "__vsc_ipynb_file__" in shell.user_ns  # VS Code


def _png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    if not isinstance(figure, CourseFigure):
        raise TypeError(f"{type(figure).__name__} is no figure of the course")
    return figure._repr_png_()


def _text(value: Any) -> str:
    """A value as the slider and the titles name it: `1,024`, `0.5`."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
