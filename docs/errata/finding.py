"""What refutes a claim: numbers, each with what it is and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from claims.ledger import Form, plain


@dataclass(frozen=True)
class Finding:
    """A number that bears on a claim. says: what it is; form: how it is written, as in the ledger."""

    says: str
    number: Any
    form: Form = plain

    @property
    def text(self) -> str:
        """The number as it is shown."""
        return self.form(self.number)


Evidence = dict[str, Finding]  # by a short key


@dataclass(frozen=True)
class Erratum:
    """A claim that sounds right.

    name: of its entry on the errata page and of the command that refutes it. claim: in a sentence. known: ids of the
    ledger that bear on it. formula: more numbers, which the ledger takes over. experiment: numbers of a run on the
    bundled model; they may differ in their last digits from machine to machine, so no page holds them.
    """

    name: str
    claim: str
    known: tuple[str, ...] = ()
    formula: Callable[[], Evidence] | None = None
    experiment: Callable[[], Evidence] | None = None
