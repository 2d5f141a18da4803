"""The labs as pages of the site: copies of `notebooks/*.ipynb`, with the outputs that they were committed with.

Sphinx reads nothing outside of its folder, so they are copied to `docs/labs` (which git ignores) before a build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sources import ROOT
from sphinx.application import Sphinx

FOLDER = "labs"


def copy_labs(app: Sphinx) -> None:
    """Make the folder hold what `notebooks/` does. A file that is the same is left alone, so it is not read again."""
    folder = Path(app.srcdir, FOLDER)
    folder.mkdir(exist_ok=True)
    labs = {lab.name: lab.read_bytes() for lab in (ROOT / "notebooks").glob("*.ipynb")}
    for stale in folder.iterdir():
        if stale.name not in labs:
            stale.unlink()
    for name, content in labs.items():
        page = folder / name
        if not page.is_file() or page.read_bytes() != content:
            page.write_bytes(content)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", copy_labs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
