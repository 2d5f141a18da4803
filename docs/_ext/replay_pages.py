"""`{replay} m4` embeds the replay of a run that `docs/replays.py` records, and links to it as a page of its own."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import replays
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

FOLDER = "replays"  # of the site, where the pages are


class replay_node(nodes.General, nodes.Element):
    """A run, replayed."""


class ReplayRun(SphinxDirective):
    """A run by its name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in replays.RUNS:
            raise self.error(f"docs/replays.py records no {name!r}")
        for file in replays.DEPENDS_ON:
            self.env.note_dependency(str(file))
        return [replay_node(run=name)]


def visit_replay(self: HTML5Translator, node: replay_node) -> None:
    name = f"{node['run']}.html"
    folder = Path(self.builder.outdir, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(replays.page(node["run"]), encoding="utf-8")
    above = "../" * self.builder.current_docname.count("/")
    href, title = f"{above}{FOLDER}/{name}", html.escape(replays.RUNS[node["run"]][0])
    self.body.append(
        f'<div class="replay"><iframe src="{href}" title="Replay of {title}" loading="lazy"></iframe>'
        f'<p><a class="reference external" href="{href}">This replay on a page of its own</a></p></div>\n'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(replay_node, override=True, html=(visit_replay, None))
    app.add_directive("replay", ReplayRun)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
