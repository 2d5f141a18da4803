"""What an erratum is: a claim that sounds right, and the numbers that refute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from claims.ledger import Claim, Derived

Evidence = dict[str, Derived]  # by a short key; an erratum gives each its source


@dataclass(frozen=True)
class Erratum:
    """A claim that sounds right."""

    name: str  # of its entry on the errata page, and of the command that refutes it
    claim: str  # in a sentence
    known: tuple[str, ...] = ()  # ids of the ledger that bear on it
    formula: Callable[[], Evidence] | None = None  # more numbers, for the ledger
    # Numbers of a run on the bundled model. Their last digits may differ between machines, so no page shows them.
    experiment: Callable[[], Evidence] | None = None

    @cached_property
    def claims(self) -> dict[str, Claim]:
        """What the formula gives, by the ids of the ledger."""
        if self.formula is None:
            return {}
        return {f"erratum-{self.name}-{key}": replace(n, by=self.formula) for key, n in self.formula().items()}


def claims_of(errata: Sequence[Erratum]) -> dict[str, Claim]:
    """What all their formulas give."""
    return {claim_id: claim for erratum in errata for claim_id, claim in erratum.claims.items()}
