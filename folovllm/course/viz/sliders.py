"""Figures with a slider: one interactive panel in a running notebook, small multiples where no widget runs.

The same drawing function serves both::

    a running notebook                            a page, GitHub, a notebook that was run in batch

    temperature  |-------o------|  1.0            temperature 0.5     temperature 1.0
    +------------------------------+              +-------------+     +-------------+
    |  the panel for 1.0           |              |             |     |             |
    +------------------------------+              +-------------+     +-------------+
                                                  temperature 1.5     temperature 2.0
                                                  +-------------+     +-------------+
                                                  |             |     |             |
                                                  +-------------+     +-------------+

`runs_widgets` decides which; `FOLOVLLM_STATIC=1` (never a slider) and `FOLOVLLM_STATIC=0` (a slider wherever ipywidgets
is installed) override it. The output always includes a picture, so a saved notebook shows one without a kernel.
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
MOST_PANELS = 4  # of the small multiples by default
STATIC = "FOLOVLLM_STATIC"


@dataclass(eq=False, repr=False)
class SliderFigure:
    """A drawing over the values of one parameter, which a notebook cell displays. Made by `slider_figure`."""

    draw: Draw
    name: str
    values: Sequence[Any]
    start: Any
    shown: Sequence[Any]
    height: float
    columns: int
    kinds: Sequence[Kind]
    title: str | None
    _pictures: dict[int, bytes] = field(default_factory=dict, init=False)  # index in `values` -> PNG

    @styled
    def panel(self, value: Any) -> Figure:
        """The drawing for one value, as shown under the slider."""
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
        """The picture, and the slider if the front end runs widgets (IPython's protocol)."""
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
    """A figure that draws the panel `draw(axes, value)` for the value of a slider over `values`.

    draw: draws one panel and returns the text after the value in its title, or "". It should take less than 0.3
    seconds: compute before, and only look up and draw here. Its labels are collected in one legend; if `kinds` are
    given, the legend names those kinds of cells instead.
    name: of the parameter. start: the slider's first value; None: the middle of `values`. shown: the values of the
    small multiples; None: up to four, spread evenly. height: of a panel, in inches. columns: of the small multiples.

    Raises ValueError for fewer than two values, or a `start` or `shown` that is not among them.
    """
    if len(values) < 2:
        raise ValueError(f"values={list(values)!r}; allowed: at least two values")
    if start is None:
        start = values[len(values) // 2]
    shown = spread_evenly(values, MOST_PANELS) if shown is None else shown
    strange = [value for value in (start, *shown) if value not in values]
    if strange or not shown:
        raise ValueError(f"start={start!r}, shown={list(shown)!r}; allowed: some of values={list(values)!r}")
    return SliderFigure(draw, name, values, start, shown, height, columns, kinds, title)


def spread_evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, the first and the last included."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def runs_widgets() -> bool:
    """Whether a slider can be moved: a notebook kernel with ipywidgets and a front end that runs widgets.

    A kernel cannot ask for its front end, but it can see what started it: Jupyter's server (JupyterLab, Notebook), VS
    Code and Colab are recognisable, a batch run (nbconvert, nbclient, pytest) has none of their marks.
    `FOLOVLLM_STATIC` overrides this. Raises ValueError if it is neither 0 nor 1.
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
        raise TypeError(f"{type(figure).__name__} is not a CourseFigure")
    return figure._repr_png_()


def _text(value: Any) -> str:
    """A value as shown in the slider and in titles: `1,024`, `0.5`."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
