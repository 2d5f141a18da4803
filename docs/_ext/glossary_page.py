"""`{course-glossary}`: the entries of `folovllm.course.glossary`, by topic, as terms that any page can link to.

The same texts are what the bundled model was trained on, so the page, the model and the prompts cannot drift
apart. An entry with `listed = false` (greetings and the like) is left out.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.std import make_glossary_term
from sphinx.util.docutils import SphinxDirective

from folovllm.course.glossary import GlossaryEntry, load_glossary


class CourseGlossary(SphinxDirective):
    """One section per topic, one definition list in each."""

    def run(self) -> list[nodes.Node]:
        entries = [entry for entry in load_glossary() if entry.listed]
        self.terms = {entry.term for entry in entries}
        return [self.section(topic, list(group)) for topic, group in groupby(entries, lambda e: e.topic)]

    def section(self, topic: str, entries: list[GlossaryEntry]) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(topic)], names=[nodes.fully_normalize_name(topic)])
        section += nodes.title(text=topic)
        items = nodes.definition_list("", *map(self.item, entries), classes=["glossary"])
        section += addnodes.glossary("", items, sorted=False)
        return section

    def item(self, entry: GlossaryEntry) -> nodes.definition_list_item:
        source, line = self.get_source_info()
        term = make_glossary_term(
            self.env, [nodes.Text(entry.term)], None, source, line, node_id=None, document=self.state.document
        )
        question = nodes.paragraph("", "", nodes.emphasis(text=entry.question), classes=["question"])
        definition = nodes.definition("", question, nodes.paragraph(text=entry.answer))
        if entry.see:
            definition += self.see_also(entry.see)
        return nodes.definition_list_item("", term, definition)

    def see_also(self, pointers: tuple[str, ...]) -> nodes.paragraph:
        """A pointer to another term becomes a link; a chapter, a file or a paper stays as it is written."""
        line = nodes.paragraph("", "See also: ", classes=["see-also"])
        for index, pointer in enumerate(pointers):
            line += nodes.Text(", " if index else "")
            line += self.link(pointer) if pointer in self.terms else nodes.Text(pointer)
        return line

    def link(self, term: str) -> addnodes.pending_xref:
        return addnodes.pending_xref(
            "",
            nodes.inline(text=term),
            refdoc=self.env.docname,
            refdomain="std",
            reftype="term",
            reftarget=term,
            refexplicit=False,
            refwarn=True,
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("course-glossary", CourseGlossary)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
