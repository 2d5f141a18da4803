"""The figures of the chapters: what is drawn under which name, from formulas, results files and the engine itself.

`folovllm.course.viz` draws; here is only what it draws from. {drawn} shows a figure by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import matplotlib as mpl
from claims.ledger import RESULTS, ROOT
from matplotlib.figure import Figure

from figures import chapter_0, chapter_1, chapter_2, chapter_3, chapter_4, chapter_5, chapter_6, chapter_7, chapter_8

CHAPTERS = (chapter_0, chapter_1, chapter_2, chapter_3, chapter_4, chapter_5, chapter_6, chapter_7, chapter_8)
FIGURES: dict[str, Callable[[], Figure]] = {
    name: draw for chapter in CHAPTERS for name, draw in chapter.FIGURES.items()
}
DEPENDS_ON = [
    file
    for folder, pattern in (
        (ROOT / "docs" / "figures", "*.py"),
        (RESULTS, "*.json"),
        (ROOT / "folovllm" / "course" / "viz", "*.py"),
    )
    for file in sorted(folder.glob(pattern))
]


def svg(name: str) -> bytes:
    """A figure as SVG, the same bytes at every build."""
    data = BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        FIGURES[name]().savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()
