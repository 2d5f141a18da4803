"""`{bug-museum}`: the exhibits of `folovllm/course/museum/*.toml`, room by room, with folded hints and answers.

Line numbers and links are looked up when the course is built: an exhibit whose line is gone fails the build.
"""

from __future__ import annotations

from itertools import groupby
from textwrap import dedent, indent
from typing import Any

from docutils import nodes
from source_links import note_source, source_reference
from sources import ROOT
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from folovllm.course.grading.museum import CATALOGUE, Exhibit, load_exhibits


class BugMuseum(SphinxDirective):
    """One section per room, one per exhibit in it."""

    def run(self) -> list[nodes.Node]:
        for file in ROOT.glob(CATALOGUE):
            self.env.note_dependency(str(file))
        try:
            exhibits = load_exhibits(ROOT).values()
            return [self.room(name, list(group)) for name, group in groupby(exhibits, key=lambda e: e.topic)]
        except (ValueError, LookupError) as error:
            raise self.error(str(error)) from None

    def room(self, name: str, exhibits: list[Exhibit]) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(name)], names=[nodes.fully_normalize_name(name)])
        section += nodes.title(text=name)
        section += [self.exhibit(exhibit) for exhibit in exhibits]
        return section

    def exhibit(self, exhibit: Exhibit) -> nodes.section:
        section = nodes.section(ids=[exhibit.id], names=[exhibit.id])
        section += nodes.title(text=exhibit.title)
        line = exhibit.line_in(exhibit.source(ROOT))
        where = nodes.paragraph("", "", nodes.literal(text=exhibit.id), nodes.Text(", in "), classes=["exhibit"])
        where += note_source(self.env, exhibit.file, line, f"{exhibit.file}, line {line}")
        change = f"{indent(dedent(exhibit.old), '- ')}\n{indent(dedent(exhibit.new), '+ ')}"
        section += [where, nodes.literal_block(change, change, language="diff")]
        section += self.parse_text_to_nodes(exhibit.symptom)
        seen = self.parse_text_to_nodes(f"*Seen:* {exhibit.seen}")
        section += seen
        section += self.folded("Hint", self.parse_text_to_nodes(exhibit.hint))
        section += self.folded("Tests of ours that find it", [self.tests(exhibit)])
        return section

    def tests(self, exhibit: Exhibit) -> nodes.bullet_list:
        items = nodes.bullet_list()
        for test in exhibit.killed_by:
            path, _, name = test.partition("[")[0].partition("::")
            items += nodes.list_item("", nodes.paragraph("", "", source_reference(self.env, f"{path}:{name}", name)))
        return items

    def folded(self, title: str, content: list[nodes.Node]) -> list[nodes.Node]:
        return [
            nodes.raw("", f'<details class="self-check"><summary>{title}</summary>', format="html"),
            *content,
            nodes.raw("", "</details>", format="html"),
        ]


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("source_links")
    app.add_directive("bug-museum", BugMuseum)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
