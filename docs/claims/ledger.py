"""What a claim is: a number of the course, how it is written, and where it comes from.

A claim is derived (a formula in code gives it), measured (a file in `results/` holds it) or cited (somebody else's,
with the source). Pages name a claim by its id and never hold its value, so no page says what its source does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"

Form = Callable[[Any], str]


class ClaimError(LookupError):
    """An id, a results file or a key in one that does not exist."""


@dataclass(frozen=True)
class Derived:
    """A number that a formula gives.

    of: computes it. form: writes it. source: "path:name" of the code that holds the formula. says: what it is.
    """

    says: str
    of: Callable[[], Any]
    form: Form
    source: str

    def value(self) -> Any:
        """The number."""
        return self.of()


@dataclass(frozen=True)
class Measured:
    """A number from `results/<file>.json`, at `path`, a key per level. A spread (median, min, max) counts as one."""

    says: str
    file: str
    path: tuple[str, ...]
    form: Form

    def value(self) -> Any:
        """The number. Raises ClaimError if the file or the key is not there."""
        found: Any = result(self.file)
        for key in self.path:
            if not isinstance(found, dict) or key not in found:
                raise ClaimError(f"results/{self.file}.json has no {'/'.join(self.path)}")
            found = found[key]
        return found


@dataclass(frozen=True)
class Cited:
    """A number of somebody else's. source: author, year and where to find it; url: a link to it."""

    says: str
    number: Any
    form: Form
    source: str
    url: str

    def value(self) -> Any:
        """The number."""
        return self.number


Claim = Derived | Measured | Cited


@dataclass(frozen=True)
class Table:
    """A table whose cells are computed. files: the results that it shows; source: the code that computes the rest."""

    says: str
    header: Sequence[str]
    rows: Callable[[], list[list[str]]]
    source: str | None = None
    files: tuple[str, ...] = ()


def text(claim: Claim) -> str:
    """The claim as it stands on a page."""
    return claim.form(claim.value())


@cache
def result(file: str) -> dict[str, Any]:
    """A results file. Raises ClaimError if it is not there."""
    path = RESULTS / f"{file}.json"
    if not path.is_file():
        raise ClaimError(f"results/{file}.json does not exist")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def provenance(file: str) -> str:
    """What a results file was measured on, in a line."""
    data = result(file)
    hardware, versions = data["hardware"], data["versions"]
    threads = hardware["threads"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {threads} thread{'s' * (threads != 1)}"
    rounds = len(data["rounds"])
    return (
        f"{data['model']}, {data['dtype']}{', random weights' * (data['load_format'] == 'dummy')}; {where}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}; {data['date'][:10]}; "
        f"median of {rounds} rounds"
    )


# ------------------------------------------------------------------ how numbers are written


def plain(number: float | str) -> str:
    """As it is; thousands apart."""
    return number if isinstance(number, str) else f"{number:,}"


def digits(count: int, unit: str = "", factor: float = 1.0) -> Form:
    """With `count` digits that matter, after multiplication with `factor`; a whole number has no decimals."""

    def form(number: float) -> str:
        scaled = number * factor
        rounded = float(f"{scaled:.{count - 1}e}")
        exponent = math.floor(math.log10(abs(rounded))) if rounded else 0  # of its first digit
        decimals = 0 if math.isclose(scaled, round(scaled), rel_tol=1e-12) else max(0, count - 1 - exponent)
        shown = f"{rounded:,.{decimals}f}"
        return f"{shown} {unit}" if unit else shown

    return form


def fixed(decimals: int, unit: str = "", factor: float = 1.0) -> Form:
    """With `decimals` decimals, after multiplication with `factor`."""

    def form(number: float) -> str:
        shown = f"{number * factor:,.{decimals}f}"
        return f"{shown} {unit}" if unit else shown

    return form


def percent(decimals: int = 0) -> Form:
    """A share of one as a percentage."""
    return fixed(decimals, "%", 100)


def power(number: float) -> str:
    """A tiny number as a power of ten that bounds it: 3e-7 is "below 1e-6"."""
    if number == 0:
        return "0"
    exponent = next(e for e in range(-12, 13) if abs(number) <= 10.0**e)
    return f"below 1e{exponent}"


def binary(number: float) -> str:
    """Bytes in binary units with three digits that matter; exact multiples need no decimals."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number / factor < 1000 else f"{number / factor:,.0f} {unit}"
    return f"{number:,.0f} B"


def median(form: Form) -> Form:
    """The median of a spread."""
    return lambda spread: form(spread["median"])


def with_range(form: Form) -> Form:
    """The median of a spread, and its ends: "4.9 (4.6 to 5.3)"."""
    return lambda spread: f"{form(spread['median'])} ({form(spread['min'])} to {form(spread['max'])})"
