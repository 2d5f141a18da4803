"""What a claim is: a number of the course, how it is written, and where it comes from.

A claim is derived (a formula in code gives it), measured (a file in `results/` has it) or cited (from a publication).
Pages name a claim by its id, or a measured number by file and path; none has a value of its own, so no page says what
its source does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from claims.forms import Form, named, plain

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"


class ClaimError(LookupError):
    """An id, a results file or a key in one that does not exist."""


@dataclass(frozen=True)
class Derived:
    """A number that a formula gives."""

    says: str  # what it is
    of: Any  # the number, or a function that computes it
    form: Form = plain
    source: str = ""  # "path:name" of the code that has the formula

    def value(self) -> Any:
        """The number."""
        return self.of() if callable(self.of) else self.of


@dataclass(frozen=True)
class Measured:
    """A number in `results/<file>.json`, or its spread over the rounds."""

    says: str
    file: str
    path: tuple[str, ...]  # a key per level
    form: Form

    def value(self) -> Any:
        """The number. Raises ClaimError if the file or the key does not exist."""
        found: Any = result(self.file)
        for key in self.path:
            if not isinstance(found, dict) or key not in found:
                raise ClaimError(f"results/{self.file}.json has no {'/'.join(self.path)}")
            found = found[key]
        return found


@dataclass(frozen=True)
class Cited:
    """A number from a publication."""

    says: str
    number: Any
    form: Form
    source: str  # author, year and where to find it
    url: str

    def value(self) -> Any:
        """The number."""
        return self.number


Claim = Derived | Measured | Cited


@dataclass(frozen=True)
class Table:
    """A table whose cells are computed."""

    says: str
    header: Sequence[str]
    rows: Callable[[], list[list[str]]]
    source: str | None = None  # the code that computes what is not in a file
    files: tuple[str, ...] = ()  # the results that it shows


def measured(name: str) -> Measured:
    """The number that a page names: "m1-engine-folo-tiny/summary/engine_over_loop|range .2f".

    Raises ClaimError if the name has no path or no form that exists.
    """
    where, _, form = name.partition("|")
    file, *path = where.split("/")
    try:
        return Measured(f"{file}, {' / '.join(path)}", file, tuple(path), named(form))
    except LookupError as error:
        raise ClaimError(f"{name}: {error}") from None


def text(claim: Claim) -> str:
    """The claim as a page shows it."""
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
