"""Claims of the errata: what refutes claims that sound right, where no chapter has the number."""

from __future__ import annotations

from functools import cache

from errata.finding import Evidence
from errata.themes import all_errata

from claims.chapter_1 import TINY
from claims.ledger import Cited, Claim, Derived, Measured, Table, digits, plain

TABLES: dict[str, Table] = {}


@cache
def evidence(name: str) -> Evidence:
    """What the formula of a claim gives; nothing where it has none."""
    formula = all_errata()[name].formula
    return {} if formula is None else formula()


def claim_id(name: str, key: str) -> str:
    """The id of a finding in the ledger."""
    return f"erratum-{name}-{key}"


def source(name: str) -> str:
    """Where the formula of a claim stands: "docs/errata/cache.py:heads_of_what"."""
    formula = all_errata()[name].formula
    if formula is None:
        raise LookupError(f"{name} has no formula")
    return f"docs/{formula.__module__.replace('.', '/')}.py:{formula.__name__}"


CLAIMS: dict[str, Claim] = {
    "decode-row-logit-difference": Measured(
        "largest difference of a logit when a decode step sees itself only, folo-tiny",
        TINY,
        ("logit_differences", "decode_sees_itself_only"),
        digits(2),
    ),
    "vllm-policies": Cited(
        "policies of vLLM's scheduler",
        "fcfs and priority",
        plain,
        "vLLM API reference, vllm.config.scheduler",
        "https://docs.vllm.ai/en/v0.13.0/api/vllm/config/scheduler/",
    ),
    **{
        claim_id(name, key): Derived(
            finding.says, lambda name=name, key=key: evidence(name)[key].number, finding.form, source(name)
        )
        for name in all_errata()
        for key, finding in evidence(name).items()
    },
}
