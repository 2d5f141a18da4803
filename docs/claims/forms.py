"""How numbers are written. A form takes a number, or the spread of a number over rounds, whose median it shows.

A form has a name, as pages have it after the path of a measured number:

    ,           as it is, thousands apart     binary      bytes in KiB, MiB, GiB
    .2f         two decimals                  power       a tiny number, by the power of ten that bounds it
    .2g         two significant digits        of          a pair: "3 of 4"
    .1%         a share of one                range .2f   the median of a spread, with its least and its greatest

A unit may follow (`UNITS`): "range .2g ms".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

NOT_TOLD = "–"  # noqa: RUF001  an en dash, as in print
Write = Callable[[Any], str]
Form = str | Write  # the name of a form, or what writes a number

UNITS = {  # as it is shown: what a number is multiplied with
    "ms": 1e3,
    "s": 1.0,
    "minutes": 1 / 60,
    "GB": 1e-9,
    "GB/s": 1e-9,
    "TB/s": 1e-12,
    "GFLOPs": 1e-9,
    "GFLOP/s": 1e-9,
    "TFLOP/s": 1e-12,
    "MiB": 2**-20,
}


def middle(number: Any) -> Any:
    """The median of a spread; a number as it is."""
    return number["median"] if isinstance(number, dict) else number


def plain(number: Any) -> str:
    """As it is; thousands apart."""
    number = middle(number)
    return number if isinstance(number, str) else f"{number:,}"


def digits(count: int, unit: str = "", factor: float = 1.0) -> Write:
    """With `count` significant digits, after multiplication with `factor`; a whole number has no decimals."""

    def write(number: Any) -> str:
        scaled = middle(number) * factor
        rounded = float(f"{scaled:.{count - 1}e}")
        exponent = math.floor(math.log10(abs(rounded))) if rounded else 0  # of its first digit
        decimals = 0 if math.isclose(scaled, round(scaled), rel_tol=1e-12) else max(0, count - 1 - exponent)
        shown = f"{rounded:,.{decimals}f}"
        return f"{shown} {unit}" if unit else shown

    return write


def fixed(decimals: int, unit: str = "", factor: float = 1.0) -> Write:
    """With `decimals` decimals, after multiplication with `factor`."""

    def write(number: Any) -> str:
        shown = f"{middle(number) * factor:,.{decimals}f}"
        return f"{shown} {unit}" if unit else shown

    return write


def percent(decimals: int = 0) -> Write:
    """A share of one as a percentage."""
    return fixed(decimals, "%", 100)


def with_range(form: Write) -> Write:
    """The median of a spread, and its ends: "4.9 (4.6 to 5.3)"."""
    return lambda spread: f"{form(spread)} ({form(spread['min'])} to {form(spread['max'])})"


def power(number: float) -> str:
    """A tiny number as a power of ten that bounds it: 3e-7 is "below 1e-6"."""
    if number == 0:
        return "0"
    exponent = next(e for e in range(-12, 13) if abs(number) <= 10.0**e)
    return f"below 1e{exponent}"


def binary(number: Any) -> str:
    """Bytes in binary units with three significant digits; exact multiples need no decimals."""
    number = middle(number)
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number / factor < 1000 else f"{number / factor:,.0f} {unit}"
    return f"{number:,.0f} B"


def of_all(pair: list[int]) -> str:
    """A count out of a whole: "3 of 4"."""
    return f"{pair[0]} of {pair[1]}"


def named(form: Form) -> Write:
    """What writes a number in this form. Raises LookupError for a name that does not exist."""
    if callable(form):
        return form
    name = form
    if name.startswith("range "):
        return with_range(named(name.removeprefix("range ")))
    if name in WORDS:
        return WORDS[name]
    found = re.fullmatch(r"\.(\d)([fg%])(?: (\S+))?", name)
    unit = found[3] if found else None
    if found is None or (unit is not None and (unit not in UNITS or found[2] == "%")):
        raise LookupError(f"the form {name!r} does not exist; allowed: those in docs/claims/forms.py")
    if found[2] == "%":
        return percent(int(found[1]))
    make = {"f": fixed, "g": digits}[found[2]]
    return make(int(found[1])) if unit is None else make(int(found[1]), unit, UNITS[unit])


WORDS: dict[str, Write] = {",": plain, "binary": binary, "power": power, "of": of_all}

# Cells of tables whose header names the unit.
ms = digits(3, factor=1e3)  # of seconds
mib = digits(3, factor=2**-20)  # of bytes
giga = digits(3, factor=1e-9)
three = digits(3)
times = fixed(2)  # a ratio
times_range = with_range(times)
share = percent()  # of one
