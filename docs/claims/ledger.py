"""What a claim is: a number of the course, how it is written, and where it comes from.

A claim is derived (a formula in code gives it), measured (a file in `results/` has it) or cited (from a publication).
Pages name a claim by its id, or a measured number by file and path; none has a value of its own, so no page says what
its source does not.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from claims.forms import NOT_TOLD, Form, named
from folovllm.course.bench.rounds import spread

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"


class ClaimError(LookupError):
    """An id, a results file or a key in one that does not exist."""


@dataclass(frozen=True)
class Derived:
    """A number that a formula gives."""

    says: str  # what it is
    of: Any  # the number, or a function that computes it
    form: Form = ","
    by: str | Callable[..., Any] = ""  # what has the formula, as "path:name" or itself; else the function that is `of`

    @property
    def source(self) -> str:
        """The "path:name" of the code that has the formula."""
        by = self.by or self.of
        if isinstance(by, str):
            return by
        by = inspect.unwrap(by)
        return f"{Path(inspect.getfile(by)).resolve().relative_to(ROOT).as_posix()}:{by.__qualname__}"

    def value(self) -> Any:
        """The number."""
        return self.of() if callable(self.of) else self.of


@dataclass(frozen=True)
class Measured:
    """A number in a results file, or its spread over the rounds."""

    says: str
    where: str  # "file/path/in/it"
    form: Form

    @property
    def file(self) -> str:
        """The file in `results/`, without its suffix."""
        return self.where.partition("/")[0]

    def value(self) -> Any:
        """The number. Raises ClaimError if the file or the key does not exist."""
        return at(self.where)


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
    files: tuple[str, ...] = ()  # the results that it shows


def measured(name: str) -> Measured:
    """The number that a page names: "m1-engine-folo-tiny/summary/engine_over_loop|range .2f".

    Raises ClaimError if the form does not exist.
    """
    where, _, form = name.partition("|")
    try:
        named(form)
    except LookupError as error:
        raise ClaimError(f"{name}: {error}") from None
    return Measured(f"results/{where.replace('/', '.json, ', 1)}", where, form)


Column = tuple[str, Form] | Callable[[str], str]


def measured_table(
    says: str, where: str, first: str, columns: Mapping[str, Column], names: Mapping[str, str] | None = None
) -> Table:
    """A table of a results file: a row per entry at `where`, "file/path/in/it".

    first: the header of the rows' names. names: the entries to show, and how they are called; None: all, as they are.
    columns: header -> a path in the entry and a form, or what writes the cell of the entry with this key.
    """
    file = where.partition("/")[0]

    def cell(key: str, column: Column) -> str:
        if not isinstance(column, tuple):
            return column(key)
        number = at(f"{where}/{key}/{column[0]}")
        return NOT_TOLD if number is None else named(column[1])(number)

    def rows() -> list[list[str]]:
        shown = {key: key for key in at(where)} if names is None else names
        return [[name, *(cell(key, column) for column in columns.values())] for key, name in shown.items()]

    return Table(says, (first, *columns), rows, files=(file,))


def grouped_table(
    header: str,
    groups: Mapping[str, str],
    first: str,
    columns: Callable[[str], Mapping[str, Column]],
    says: str,
    names: Mapping[str, str] | None = None,
) -> Table:
    """Measured tables of one shape, one below the other, each with its group's name in the first column.

    groups: the name and the place in the file of each. columns: of a group.
    """
    tables = {group: measured_table(says, where, first, columns(group), names) for group, where in groups.items()}
    one = next(iter(tables.values()))

    def rows() -> list[list[str]]:
        return [[group, *row] for group, table in tables.items() for row in table.rows()]

    return Table(says, (header, *one.header), rows, one.files)


def text(claim: Claim) -> str:
    """The claim as a page shows it."""
    return named(claim.form)(claim.value())


def at(where: str) -> Any:
    """What a results file has at "file/path/in/it". Raises ClaimError if the file or the path does not exist."""
    file, _, path = where.partition("/")
    try:
        return within(result(file), path)
    except KeyError:
        raise ClaimError(f"results/{file}.json has no {path}") from None


def within(data: Any, path: str) -> Any:
    """The value at a path, a key per level; a key may have a slash itself. Raises KeyError where there is none."""
    keys = path.split("/")
    while keys:
        ends = range(1, len(keys) + 1) if isinstance(data, dict) else ()
        end = next((end for end in ends if "/".join(keys[:end]) in data), None)
        if end is None:
            raise KeyError(path)
        data, keys = data["/".join(keys[:end])], keys[end:]
    return data


def over_rounds(file: str, number: Callable[[Any], float]) -> dict[str, float]:
    """The spread of a number that each round of a results file gives."""
    found = spread([number(current) for current in result(file)["rounds"]])
    if found is None:
        raise ClaimError(f"results/{file}.json has no rounds")
    return found


def ratio(file: str, upper: str, lower: str) -> dict[str, float]:
    """The spread of a ratio of two numbers, each at a path in a round, taken inside of each round."""
    return over_rounds(file, lambda current: within(current, upper) / within(current, lower))


@cache
def result(file: str) -> dict[str, Any]:
    """A results file. Raises ClaimError if it is not there."""
    path = RESULTS / f"{file}.json"
    if not path.is_file():
        raise ClaimError(f"results/{file}.json does not exist")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def provenance(file: str, how: str | None = None) -> str:
    """What a results file was measured on, in a line. how: what to say in place of the number of rounds."""
    data = result(file)
    if "rounds" not in data:
        return "Computed, the same on every machine"
    hardware, versions = data["hardware"], data["versions"]
    threads = hardware["threads"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {threads} thread{'s' * (threads != 1)}"
    return (
        f"Measured: {data['model']}, {data['dtype']}{', random weights' * (data['load_format'] == 'dummy')}; {where}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}; {data['date'][:10]}; "
        f"{how or 'median of ' + str(len(data['rounds'])) + ' rounds'}"
    )
