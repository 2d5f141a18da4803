"""The ledger of the course: the claims and tables of every chapter, of the errata and of the interview questions.

To add a measured number, write {measured}`file/path/in/it|form` on the page (see `forms`). To add one that a formula
gives, or that is cited, give it an id in its chapter's `CLAIMS` and write {claim}`the-id`. Tables go into `TABLES` and
are shown by {claims-table}. `tests/course/test_claims.py` compares the values with literal ones, and fails on an id
that does not exist or that no page uses.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from errata.themes import THEMES

from claims import compatibility_families, interview
from claims.ledger import ROOT, Claim, ClaimError, Table, text

CHAPTERS: tuple[ModuleType, ...] = (
    *(import_module(f"claims.chapter_{number}") for number in range(9)),
    *THEMES,
    interview,
    compatibility_families,
)
DOCS = ROOT / "docs"
ROLE = re.compile(r"\{measured\}`([^`]+)`")


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
    """What a page shows for that id. Raises ClaimError where there is no such id or no source for it."""
    return text(get_claim(claim_id))


def page_of(chapter: ModuleType) -> str:
    """The page that a module of claims belongs to, below docs/ and without its suffix; "" where it has none."""
    name = chapter.__name__.rpartition(".")[2]
    number = re.fullmatch(r"chapter_(\d)", name)
    found = DOCS.glob(f"chapters/0{number[1]}_*.md" if number else f"{name}.md")
    return next((name_of(page) for page in found), "")


def name_of(page: Path) -> str:
    """A page below docs/, without its suffix."""
    return page.relative_to(DOCS).with_suffix("").as_posix()


def measured_numbers() -> dict[str, list[str]]:
    """Page -> the measured numbers that it names and that no page before it does."""
    seen: dict[str, None] = {}
    found: dict[str, list[str]] = {}
    for page in (*sorted(DOCS.glob("chapters/*.md")), *sorted(DOCS.glob("*.md"))):
        names = dict.fromkeys(ROLE.findall(page.read_text(encoding="utf-8")))
        found[name_of(page)] = [name for name in names if name not in seen]
        seen |= names
    return found


def _merged(name: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for chapter in CHAPTERS:
        own = getattr(chapter, name, {})
        if twice := own.keys() & merged.keys():
            raise ValueError(f"{chapter.__name__}: {sorted(twice)} is in use by another chapter")
        merged |= own
    return merged
