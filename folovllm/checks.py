"""Checks of arguments. Each raises a ValueError that names the field, the value and what is allowed."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast, dataclass_transform

from folovllm.errors import ConfigError, InvalidRequestError, errors_as

T = TypeVar("T")


def invalid(name: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is not allowed."""
    return ValueError(f"{name}={value!r} is not valid; allowed: {allowed}")


def quoted(choices: Sequence[object]) -> str:
    """The choices as an error message lists them."""
    return ", ".join(map(repr, choices))


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Accept an int (not a bool) in [minimum, maximum]."""
    allowed = f"an integer >= {minimum}" + ("" if maximum is None else f" and <= {maximum}")
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]
        raise invalid(name, value, allowed)


def check_float(name: str, value: object, low: float, high: float, allowed: str | None = None) -> float:
    """Accept a real number in [low, high], and return it as a float. NaN is in no range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise invalid(name, value, allowed or f"a number >= {low} and <= {high}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Accept one of `choices`."""
    if value not in choices:
        raise invalid(name, value, quoted(choices))


def check_bool(name: str, value: object, allowed: str = "True or False") -> None:
    """Accept True and False."""
    if not isinstance(value, bool):
        raise invalid(name, value, allowed)


def as_int(value: object) -> int | None:
    """An integer of any library (numpy, torch) as an int; None for anything else, bools included."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(cast(Any, value))
    except TypeError:
        return None


def as_list(value: object) -> Any:
    """An array or a tensor of any library as a list, of lists if it has more dimensions; other values as they are."""
    return cast(Any, value).tolist() if getattr(value, "ndim", 0) and hasattr(value, "tolist") else value


def unknown_name(owner: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for an unknown keyword. The nearest known name is given as a hint."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{owner} has no field {name!r}{hint}; allowed: {', '.join(known)}")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """A frozen dataclass that raises ConfigError, never TypeError, for an unknown keyword or a value not allowed."""
    return _checked_dataclass(cls, ConfigError)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def request_params(cls: type[T]) -> type[T]:
    """The same, with InvalidRequestError."""
    return _checked_dataclass(cls, InvalidRequestError)


def _checked_dataclass(cls: type[T], error: type[ValueError]) -> type[T]:
    made = dataclass(frozen=True)(cls)
    known = [f.name for f in fields(cast(Any, made))]
    generated: Callable[..., None] = made.__init__

    @functools.wraps(generated)
    @errors_as(error)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise unknown_name(cls.__name__, name, known)
        generated(self, *args, **kwargs)

    cast(Any, made).__init__ = __init__
    return made
