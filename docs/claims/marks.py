"""Numbers from the ledger in files that are read as they are: the README, milestone pages, the labs' texts.

    The cache takes <!-- claim: kv-bytes-llama2-7b -->512 KiB<!-- /claim --> per token.

    The tests take <!-- measured: test-suite/summary/seconds|.0f minutes -->11 minutes<!-- /measured -->.

    <!-- table: kv-sizes -->
    | model | ... |
    <!-- /table -->

Between the marks is what `docs/claims` has for the id, or the number of a results file: `python docs/fill_numbers.py`
writes it there, and `tests/course/test_marks.py` fails where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from claims import front_page, registry
from claims.ledger import ROOT, Table, measured, text

CLAIM = re.compile(r"(<!-- (claim|measured): ([^>]+) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(^[# ]*<!-- /table -->)", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (/?)(claim|measured|table)(: [^>]+)? -->")


def files() -> list[Path]:
    """The files in which numbers may be marked."""
    labs = sorted((ROOT / "notebooks").glob("*.py"))
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("milestones/*/README.md")), *labs]


def fill(page: str) -> str:
    """The page with the ledger's numbers between its marks.

    Raises ClaimError for an id that the ledger does not have, ValueError for a mark that is not closed or not opened.
    """
    open_kind = None
    for mark in MARK.finditer(page):
        closes, kind, name = mark.groups()
        if bool(closes) == (open_kind is None) or (closes and kind != open_kind) or bool(closes) == bool(name):
            line = page.count("\n", 0, mark.start()) + 1
            raise ValueError(
                f"line {line}: {mark.group()} is out of place; allowed: <!-- claim: ID -->...<!-- /claim -->"
            )
        open_kind = None if closes else kind
    if open_kind is not None:
        raise ValueError(
            f"the last {open_kind} is not closed; allowed: <!-- {open_kind}: ID -->...<!-- /{open_kind} -->"
        )
    page = CLAIM.sub(lambda found: found[1] + number_of(found[2], found[3]) + found[5], page)
    return TABLE.sub(lambda found: found[1] + markdown(table_of(found[2])) + found[4], page)


def number_of(kind: str, name: str) -> str:
    """A claim, or a measured number. Raises ClaimError for one that does not exist."""
    return text(measured(name)) if kind == "measured" else registry.claim_text(name)


def table_of(name: str) -> Table:
    """A table of the front page, or of any chapter. Raises ClaimError for an unknown one."""
    return front_page.TABLES.get(name) or registry.get_table(name)


def marked_ids(page: str) -> list[str]:
    """The ids of claims and tables, and the names of measured numbers, that a page shows."""
    return [*(found[3] for found in CLAIM.finditer(page)), *(found[2] for found in TABLE.finditer(page))]


def markdown(table: Table) -> str:
    """A table of the ledger as lines of Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    return line(table.header) + "|" + "---|" * len(table.header) + "\n" + "".join(map(line, table.rows()))
