"""The ledger of the course. One module per chapter; ids are unique over all of them.

To add a number: give it an id in its chapter's `CLAIMS`, with a formula or a path into a results file, and write
{claim}`the-id` where it belongs. Tables go into `TABLES` and are shown by {claims-table}. `tests/course/test_claims.py`
holds the values against literal ones and fails on an id that leads nowhere or that no page uses.
"""

from __future__ import annotations

from types import ModuleType

from claims import (
    chapter_0,
    chapter_1,
    chapter_2,
    chapter_3,
    chapter_4,
    chapter_5,
    chapter_6,
    chapter_7,
    chapter_8,
    errata,
    interview,
    m3_bench,
    m4_bench,
)
from claims.ledger import Claim, ClaimError, Table, text

CHAPTERS: tuple[ModuleType, ...] = (
    chapter_0,
    chapter_1,
    chapter_2,
    chapter_3,
    chapter_4,
    m3_bench,
    chapter_5,
    chapter_6,
    chapter_7,
    m4_bench,
    chapter_8,
    errata,
    interview,
)

__all__ = [
    "CHAPTERS",
    "Claim",
    "ClaimError",
    "Table",
    "all_claims",
    "all_tables",
    "claim_text",
    "get_claim",
    "get_table",
]


def all_claims() -> dict[str, Claim]:
    """Every claim by its id, in the order of the chapters. Raises ValueError for an id that two chapters use."""
    return _merged("CLAIMS")


def all_tables() -> dict[str, Table]:
    """Every table by its id. Raises ValueError for an id that two chapters use."""
    return _merged("TABLES")


def get_claim(claim_id: str) -> Claim:
    """The claim with that id. Raises ClaimError if there is none."""
    claims = all_claims()
    if claim_id not in claims:
        raise ClaimError(f"no claim has the id {claim_id!r}")
    return claims[claim_id]


def get_table(table_id: str) -> Table:
    """The table with that id. Raises ClaimError if there is none."""
    tables = all_tables()
    if table_id not in tables:
        raise ClaimError(f"no table has the id {table_id!r}")
    return tables[table_id]


def claim_text(claim_id: str) -> str:
    """What stands on a page for that id. Raises ClaimError where there is no such id or no source for it."""
    return text(get_claim(claim_id))


def _merged(name: str) -> dict[str, object]:
    merged: dict[str, object] = {}
    for chapter in CHAPTERS:
        own = getattr(chapter, name)
        if twice := own.keys() & merged.keys():
            raise ValueError(f"{chapter.__name__}: {sorted(twice)} is in use by another chapter")
        merged |= own
    return merged
