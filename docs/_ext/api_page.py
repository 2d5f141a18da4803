"""`api.md`, the reference of the public names: written from the package before each build (git ignores it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reference import reference
from sphinx.application import Sphinx


def write_page(app: Sphinx) -> None:
    """Write the page where it has changed, so that an unchanged one is not read again."""
    page, text = Path(app.srcdir, "api.md"), reference()
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
