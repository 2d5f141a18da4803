"""The evidence of a claim that sounds right, and the way from a chapter to its entry.

    ```{evidence} upper-triangle        :::{erratum} The claim
    ```                                 :entry: upper-triangle

{evidence} shows the numbers of the ledger that bear on the claim, and the command that prints them and runs its
experiment. {erratum} (see `chapter_parts`) then ends with a link to the entry. A name that `docs/errata` does not have
is an error.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from claim_roles import ICONS, claim_node
from claims import ledger, registry
from docutils import nodes
from errata.finding import Erratum
from errata.themes import all_errata
from source_links import note_source
from sources import ROOT
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

COMMAND = "python docs/errata/run.py"
SHORT = 28  # characters of a value that stays on one line


class ShowEvidence(SphinxDirective):
    """The numbers of one claim, and the command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        erratum = all_errata().get(name)
        if erratum is None:
            raise self.error(f"docs/errata has no claim {name!r}")
        ids = [*erratum.known, *erratum.claims]
        made: list[nodes.Node] = [self.table(ids)] if ids else []
        return [*made, self.command(erratum)]

    def table(self, ids: list[str]) -> nodes.table:
        """A row per number: what it is, and the number with a link to the ledger."""
        group = nodes.tgroup(cols=2)
        group += [nodes.colspec(colwidth=3), nodes.colspec(colwidth=1)]
        body = nodes.tbody()
        for number in ids:
            claim = registry.get_claim(number)
            if isinstance(claim, ledger.Measured):
                self.env.note_dependency(str(ledger.RESULTS / f"{claim.file}.json"))
            kind = ICONS[type(claim)]
            value = claim_node(
                "", ledger.text(claim), classes=["claim", kind], anchor=f"claim-{number}", title=f"{kind}; id {number}"
            )
            short = ["short"] if len(ledger.text(claim)) <= SHORT else []
            says, number_cell = nodes.paragraph("", claim.says), nodes.paragraph("", "", value)
            body += nodes.row("", nodes.entry("", says), nodes.entry("", number_cell, classes=short))
        group += body
        return nodes.table("", group, classes=["evidence"])

    def command(self, erratum: Erratum) -> nodes.paragraph:
        """How a reader runs it, and where its code is."""
        line = nodes.paragraph("", "", nodes.literal(text=f"{COMMAND} {erratum.name}"), classes=["evidence-command"])
        for find, how in ((erratum.formula, " computes: "), (erratum.experiment, " runs: ")):
            if find is not None:
                path = Path(inspect.getfile(find)).relative_to(ROOT).as_posix()
                line += nodes.Text(how)
                line += note_source(self.env, path, inspect.getsourcelines(find)[1], find.__name__)
        return line


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("evidence", ShowEvidence)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
