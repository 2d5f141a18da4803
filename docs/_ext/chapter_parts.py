"""The parts that chapters have beside text: figures drawn at build time, errata, and questions with folded answers.

    ```{drawn} causal-masks            :::{erratum} The claim            :::{self-check} The question?
    :alt: What it shows, in words      Why it is plausible, and how      The answer, shown when the reader
    The caption                        it is refuted                     asks for it
    ```                                :::                               :::

An erratum may name its entry on the errata page, `:entry: upper-triangle`: it then ends with a link to it.
`docs/figures` says how each figure is drawn. A figure that does not exist, or without words for it, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import figures
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator


class drawn_node(nodes.General, nodes.Inline, nodes.Element):
    """An image that is drawn when its page is written."""


class Drawn(SphinxDirective):
    """A figure by its name, with a caption."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Callable[[str], Any]]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in figures.FIGURES:
            raise self.error(f"docs/figures draws no {name!r}")
        if not self.options.get("alt"):
            raise self.error(f"the figure {name!r} needs :alt:, its content in words")
        for file in figures.DEPENDS_ON:
            self.env.note_dependency(str(file))
        figure = nodes.figure("", drawn_node(figure=name, alt=self.options["alt"]), classes=["drawn"])
        caption = self.parse_content_to_nodes()
        if len(caption) != 1 or not isinstance(caption[0], nodes.paragraph):
            raise self.error(f"the figure {name!r} needs a caption of one paragraph")
        figure += nodes.caption("", "", *caption[0].children)
        return [figure]


def visit_drawn(self: HTML5Translator, node: drawn_node) -> None:
    name = f"drawn-{node['figure']}.svg"
    folder = Path(self.builder.outdir, self.builder.imagedir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(figures.svg(node["figure"]))
    self.body.append(self.emptytag(node, "img", src=f"{self.builder.imgpath}/{name}", alt=node["alt"], width="700"))
    raise nodes.SkipNode


class Erratum(SphinxDirective):
    """A claim that is wrong, why it is plausible, and how it is refuted."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec: ClassVar[dict[str, Callable[[str], Any]]] = {"entry": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        claim, messages = self.parse_inline(self.arguments[0])
        title = nodes.title("", "", nodes.Text("Erratum: "), *claim)
        body = [*messages, *self.parse_content_to_nodes()]
        if "entry" in self.options:
            body += self.parse_text_to_nodes(f"{{ref}}`Run it <erratum-{self.options['entry']}>`.")
        return [nodes.admonition("", title, *body, classes=["erratum"])]


class SelfCheck(SphinxDirective):
    """A question whose answer is folded away."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        question, messages = self.parse_inline(self.arguments[0])
        return [
            nodes.raw("", '<details class="self-check"><summary>', format="html"),
            nodes.paragraph("", "", *question),
            *messages,
            nodes.raw("", "</summary>", format="html"),
            *self.parse_content_to_nodes(),
            nodes.raw("", "</details>", format="html"),
        ]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(drawn_node, override=True, html=(visit_drawn, None))
    app.add_directive("drawn", Drawn)
    app.add_directive("erratum", Erratum)
    app.add_directive("self-check", SelfCheck)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
