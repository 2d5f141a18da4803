"""Numbers from the ledger in files that are read as they are: the README, milestone pages, the labs' texts.

    The cache takes <!-- claim: kv-bytes-llama2-7b -->512 KiB<!-- /claim --> per token.

    <!-- table: kv-sizes -->
    | model | ... |
    <!-- /table -->

What stands between the marks is what `docs/claims` has for the id: `python docs/fill_numbers.py` writes it there, and
`tests/course/test_marks.py` fails where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import claims
from claims import front_page
from claims.ledger import text as text_of

ROOT = Path(__file__).resolve().parent.parent.parent
CLAIM = re.compile(r"(<!-- claim: (\S+) -->)(.*?)(<!-- /claim -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(^[# ]*<!-- /table -->)", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (/?)(claim|table)(: \S+)? -->")


def files() -> list[Path]:
    """The files in which numbers may be marked."""
    labs = sorted((ROOT / "notebooks").glob("*.py"))
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("milestones/*/README.md")), *labs]


def fill(text: str) -> str:
    """The text with the ledger's numbers between its marks.

    Raises ClaimError for an id that the ledger does not have, ValueError for a mark that is not closed or not opened.
    """
    open_kind = None
    for mark in MARK.finditer(text):
        closes, kind, name = mark.groups()
        if bool(closes) == (open_kind is None) or (closes and kind != open_kind) or bool(closes) == bool(name):
            line = text.count("\n", 0, mark.start()) + 1
            raise ValueError(
                f"line {line}: {mark.group()} is out of place; allowed: <!-- claim: ID -->...<!-- /claim -->"
            )
        open_kind = None if closes else kind
    if open_kind is not None:
        raise ValueError(
            f"the last {open_kind} is not closed; allowed: <!-- {open_kind}: ID -->...<!-- /{open_kind} -->"
        )
    text = CLAIM.sub(lambda found: found[1] + claim_text(found[2]) + found[4], text)
    return TABLE.sub(lambda found: found[1] + markdown(table_of(found[2])) + found[4], text)


def claim_text(name: str) -> str:
    """A claim of the front page, or of any chapter, as it is written. Raises ClaimError for an unknown one."""
    own = front_page.CLAIMS.get(name)
    return claims.claim_text(name) if own is None else text_of(own)


def table_of(name: str) -> claims.Table:
    """A table of the front page, or of any chapter. Raises ClaimError for an unknown one."""
    return front_page.TABLES.get(name) or claims.get_table(name)


def marked_ids(text: str) -> list[str]:
    """The ids of claims and tables that a text shows."""
    return [found[2] for pattern in (CLAIM, TABLE) for found in pattern.finditer(text)]


def markdown(table: claims.Table) -> str:
    """A table of the ledger as lines of Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    return line(table.header) + "|" + "---|" * len(table.header) + "\n" + "".join(map(line, table.rows()))
