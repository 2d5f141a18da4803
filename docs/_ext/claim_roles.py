"""{claim}, {measured}, {claims-table}, {provenance} and {quoted}: numbers on a page, each with its source.

{claim}`kv-bytes-llama2-7b` writes the value that `docs/claims` has for the id, and links to its entry in the ledger.
{measured}`m1-engine-folo-tiny/summary/engine_over_loop|range .2f` does so for a number of a results file: its path, a
key per level, and one of the forms of `docs/claims/forms.py`.
{claims-table}`two-workloads` does the same for a whole table. {provenance}`file` says where a results file comes from.
{quoted}`50x` marks a number that another text states and that the page is about. An id without a source is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from claims import ledger, registry
from docutils import nodes
from docutils.parsers.rst import directives
from source_links import note_source, source_reference
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.writers.html5 import HTML5Translator

LEDGER_PAGE = "ledger"
ICONS = {ledger.Derived: "derived", ledger.Measured: "measured", ledger.Cited: "cited"}


class claim_node(nodes.inline):
    """A number that links to its entry in the ledger."""


def visit_claim(self: HTML5Translator, node: claim_node) -> None:
    ledger_page = self.builder.get_relative_uri(self.builder.current_docname, LEDGER_PAGE)
    href = f"{ledger_page}#{node['anchor']}"
    self.body.append(self.starttag(node, "a", "", href=href, title=node["title"]))


def depart_claim(self: HTML5Translator, node: claim_node) -> None:
    self.body.append("</a>")


class ClaimRole(SphinxRole):
    """The value of a claim, or, as {measured}, a number of a results file."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            by_path = self.name == "measured"
            claim = ledger.measured(self.text) if by_path else registry.get_claim(self.text)
            text = ledger.text(claim)
        except ledger.ClaimError as error:
            return problem(self, error)
        if isinstance(claim, ledger.Measured):
            self.env.note_dependency(str(ledger.RESULTS / f"{claim.file}.json"))
        kind = ICONS[type(claim)]
        title = f"{claim.says} ({kind})" if by_path else f"{claim.says} ({kind}; id {self.text})"
        anchor = measured_anchor(self.text) if by_path else f"claim-{self.text}"
        return [claim_node("", text, classes=["claim", kind], anchor=anchor, title=title)], []


def measured_anchor(name: str) -> str:
    """The id of a measured number's entry in the ledger."""
    return nodes.make_id(f"measured-{name}")


class ProvenanceRole(SphinxRole):
    """Where, with what and when a results file was measured. "file|one run" replaces "median of n rounds"."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        file, _, how = self.text.partition("|")
        try:
            note = provenance(self.env, file, how, nodes.inline)
        except ledger.ClaimError as error:
            return problem(self, error)
        return [note], []


class QuotedRole(SphinxRole):
    """A number as another text states it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        return [nodes.inline("", self.text, classes=["quoted"])], []


class ClaimsTable(SphinxDirective):
    """A table of the ledger, its caption and, below it, what it was measured on."""

    required_arguments = 1
    final_argument_whitespace = False
    option_spec: ClassVar[dict[str, Callable[[str], Any]]] = {"provenance": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        try:
            table = registry.get_table(self.arguments[0])
            made: list[nodes.Node] = [make_table(table.header, table.rows(), self.arguments[0])]
            how = self.options.get("provenance")
            made += [provenance(self.env, file, how, nodes.paragraph) for file in table.files]
        except ledger.ClaimError as error:
            raise self.error(str(error)) from None
        return made


class ClaimsLedger(SphinxDirective):
    """All claims, chapter by chapter, and the measured numbers of its page: the value, what it is, and its source."""

    def run(self) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        listed = registry.measured_numbers()
        for page in listed:
            self.env.note_dependency(str(registry.DOCS / f"{page}.md"))
        for chapter in registry.CHAPTERS:
            title = (chapter.__doc__ or "").splitlines()[0].removeprefix("Claims of ").rstrip(".")
            claims, numbers = getattr(chapter, "CLAIMS", {}), listed.pop(registry.page_of(chapter), [])
            if claims or numbers:
                made.append(self.section(title[0].upper() + title[1:], claims, numbers))
        return [*made, *(self.section(f"Measured, on {page}", {}, names) for page, names in listed.items() if names)]

    def section(self, title: str, claims: dict[str, ledger.Claim], numbers: list[str]) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(title)])
        section += nodes.title(text=title)
        try:
            section += [self.entry(claim, f"claim-{claim_id}", claim_id) for claim_id, claim in claims.items()]
            section += [self.entry(ledger.measured(name), measured_anchor(name)) for name in numbers]
        except LookupError as error:
            raise self.error(str(error)) from None
        return section

    def entry(self, claim: ledger.Claim, anchor: str, claim_id: str = "") -> nodes.paragraph:
        line = nodes.paragraph(classes=["ledger-entry"], ids=[anchor])
        line += nodes.strong(text=ledger.text(claim))
        if claim_id:
            line += nodes.Text(f": {claim.says}. ")
            line += nodes.literal(text=claim_id)
        line += nodes.Text(f", {ICONS[type(claim)]}: ")
        if isinstance(claim, ledger.Measured):
            self.env.note_dependency(str(ledger.RESULTS / f"{claim.file}.json"))
            line += result_reference(self.env, claim.file)
            line += nodes.Text(", " + claim.where.partition("/")[2].replace("/", " / "))
        elif isinstance(claim, ledger.Derived):
            line += source_reference(self.env, claim.source)
        else:
            line += nodes.reference("", claim.source, refuri=claim.url)
        return line


def provenance(env: BuildEnvironment, file: str, how: str | None, kind: type[nodes.TextElement]) -> nodes.TextElement:
    """Where, with what and when a results file was measured, and a link to it."""
    env.note_dependency(str(ledger.RESULTS / f"{file}.json"))
    note = kind("", f"{ledger.provenance(file, how)}; ", classes=["provenance"])
    note += result_reference(env, file)
    note += nodes.Text(".")
    return note


def make_table(header: Any, rows: list[list[str]], table_id: str) -> nodes.table:
    """A table node; columns of numbers are aligned at the right."""
    right = [sum(row[i][:1].isdigit() for row in rows) > len(rows) / 2 for i in range(len(header))]
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    group += nodes.thead("", make_row(header, right))
    group += nodes.tbody("", *(make_row(row, right) for row in rows))
    return nodes.table("", group, classes=["claims-table"], ids=[f"table-{table_id}"])


def make_row(cells: Any, right: list[bool]) -> nodes.row:
    entries = (
        nodes.entry("", nodes.paragraph(text=cell), classes=["text-right"] * at_right + ["short"] * (len(cell) < 15))
        for cell, at_right in zip(cells, right, strict=True)
    )
    return nodes.row("", *entries)


def result_reference(env: BuildEnvironment, file: str) -> nodes.Node:
    """A link to a results file, which is shown as a page of its own."""
    return note_source(env, f"results/{file}.json", None, f"results/{file}.json")


def problem(role: SphinxRole, error: Exception) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """An error at the role's place; `sphinx -W` fails on it."""
    message = role.inliner.reporter.error(str(error), line=role.lineno)
    return [role.inliner.problematic(role.rawtext, role.rawtext, message)], [message]


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("source_links")
    app.add_node(claim_node, override=True, html=(visit_claim, depart_claim))
    app.add_role("claim", ClaimRole())
    app.add_role("measured", ClaimRole())
    app.add_role("provenance", ProvenanceRole())
    app.add_role("quoted", QuotedRole())
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("claims-ledger", ClaimsLedger)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
