"""The table of families: which Hugging Face decoders run at which milestone, as `results/families.json` has it."""

from __future__ import annotations

from claims.ledger import Table, at

FILE, MILESTONES = "families", ("m1", "m2", "m3", "m4")
SAME = "same tokens"


def rows() -> list[list[str]]:
    """A row per family: those that run everywhere first, and within each kind by name."""
    found: dict[str, dict[str, str]] = at(f"{FILE}/families")
    order = sorted(found, key=lambda name: (sum(found[name][m] != SAME for m in MILESTONES), name))
    return [[name, *(cell(found[name][m]) for m in MILESTONES), reason(found[name])] for name in order]


def cell(answer: str) -> str:
    """What a milestone did."""
    return answer if answer == SAME else "refused"


def reason(answers: dict[str, str]) -> str:
    """Why the newest milestone refuses, without the name of the family and what runs it instead."""
    refusal = answers[MILESTONES[-1]]
    return "" if refusal == SAME else refusal.partition(": ")[2].partition(";")[0]


TABLES = {
    "families": Table(
        "families of Hugging Face decoders at each milestone",
        ("model_type", *(m.upper() for m in MILESTONES), "why not at M4"),
        rows,
        files=(FILE,),
    )
}
