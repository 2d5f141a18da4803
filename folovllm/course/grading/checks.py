"""Checks whose failure shows the call, the returned value, the expected value, and the reason.

The graded tests in `milestones/` are written with them. Needs no pytest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

MAX_SHOWN = 96  # a tensor with more elements is shown as its shape; texts are cut at 4 times as many characters


class WrongAnswer(AssertionError):
    """An exercise's answer is wrong; the message is written for the learner."""


class Call:
    """One call of a learner's function, made by a check and shown when the check fails."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        given = [show_argument(a) for a in args] + [f"{name}={show_argument(a)}" for name, a in kwargs.items()]
        self.text = f"{getattr(function, '__name__', 'call')}({', '.join(given)})"  # before the call changes them
        self._make = lambda: function(*args, **kwargs)

    def result(self) -> Any:
        """Make the call and return its result."""
        return self._make()

    def must_return(self, want: Any, why: str = "") -> None:
        """The call returns `want`: the same shape and type for tensors, equal up to rounding for floats."""
        got = self._make()
        problem = difference(got, want)
        if problem is not None:
            self.fail(got, want, why, problem)

    def must_be_tensor(self, shape: Sequence[int], dtype: torch.dtype, why: str = "") -> torch.Tensor:
        """The call returns a tensor of this shape and type, which is returned for further checks."""
        got = self._make()
        problem = _tensor_form(got, list(shape), dtype)
        if problem is not None:
            self.fail(got, None, why, problem)
        tensor: torch.Tensor = got
        return tensor

    def must_be_tensors(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, why: str = "") -> list[torch.Tensor]:
        """The call returns a tuple of tensors of these shapes, all of one type."""
        got = self._make()
        if not isinstance(got, (tuple, list)) or len(got) != len(shapes):
            self.fail(got, None, why, f"{len(shapes)} tensors were expected.")
        for i, (value, shape) in enumerate(zip(got, shapes, strict=True)):
            problem = _tensor_form(value, list(shape), dtype)
            if problem is not None:
                self.fail(got, None, why, f"Value {i + 1} of {len(shapes)}: {problem}")
        return list(got)

    def must_refuse(self, why: str) -> None:
        """The call raises ValueError."""
        try:
            got = self._make()
        except ValueError:
            return
        raise WrongAnswer("\n".join([self.text, _block("returned", got), "expected  a ValueError", why]))

    def fail(self, got: Any, want: Any = None, why: str = "", problem: str = "") -> NoReturn:
        """Raise WrongAnswer with the call, both values and the reason."""
        parts = [self.text, _block("returned", got)]
        if got is None:
            problem = "Is there a `return`?"
        if want is not None:
            parts.append(_block("expected", want))
        raise WrongAnswer("\n".join(p for p in (*parts, problem, why) if p))


def difference(got: Any, want: Any) -> str | None:
    """None if `got` equals `want`, else a sentence on where they differ, "" if the values show it."""
    if isinstance(want, torch.Tensor):
        return _tensor_form(got, list(want.shape), want.dtype) or _tensor_values(got, want)
    if isinstance(want, tuple):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"{len(want)} values were expected."
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            problem = difference(g, w)
            if problem is not None:
                return f"Value {i + 1} of {len(want)} differs. {problem}".strip()
        return None
    if isinstance(got, torch.Tensor):
        return f"A plain {type(want).__name__} was expected, not a tensor."
    if isinstance(want, float) and isinstance(got, (int, float)):
        return None if math.isclose(got, want, rel_tol=1e-6) else ""
    return None if bool(got == want) else ""


def _tensor_form(got: Any, shape: list[int], dtype: torch.dtype) -> str | None:
    if not isinstance(got, torch.Tensor):
        return f"A tensor was expected, not {_a(type(got).__name__)}."
    if list(got.shape) != shape:
        return f"The shape is {list(got.shape)}, it should be {shape}."
    if got.dtype != dtype:
        return f"The dtype is {got.dtype}, it should be {dtype}."
    return None


def _tensor_values(got: torch.Tensor, want: torch.Tensor) -> str | None:
    if want.is_floating_point():
        wrong = ~torch.isclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    else:
        wrong = got != want
    if not bool(wrong.any()):
        return None
    where = wrong.nonzero()[0].tolist()
    pair = (_element(got[tuple(where)]), _element(want[tuple(where)]))
    return f"First difference at {where}: {pair[0]}, it should be {pair[1]}."


def show(value: Any) -> str:
    """A value for a learner: booleans of tensors as T and F, one line per row of a matrix."""
    if isinstance(value, torch.Tensor):
        if value.numel() > MAX_SHOWN or value.dim() > 2:
            return f"a tensor of shape {list(value.shape)}"
        if value.dim() == 2:
            return "\n".join(_row(row) for row in value) or "[]"
        return _row(value) if value.dim() == 1 else _element(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str, list, tuple)):
        return _short(repr(value))
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.7g}"
    if isinstance(value, tuple) and any(isinstance(v, torch.Tensor) for v in value):
        return "\n".join(f"{i + 1}: " + show(v).replace("\n", "\n   ") for i, v in enumerate(value))
    return _short(repr(value))


def show_argument(value: Any) -> str:
    """A value on one line, for the arguments of a call."""
    if isinstance(value, torch.Tensor):
        if value.numel() > MAX_SHOWN // 2:
            return f"<tensor {list(value.shape)}>"
        return "[" + ", ".join(_row(row) for row in value) + "]" if value.dim() == 2 else show(value)
    if isinstance(value, torch.nn.Module):
        return f"<{type(value).__name__}>"
    if callable(value):
        return getattr(value, "__name__", f"<{type(value).__name__}>")
    return _short(repr(value))


def _block(name: str, value: Any) -> str:
    """`name` and the value beside it, all lines aligned."""
    return f"{name}  " + show(value).replace("\n", "\n" + " " * (len(name) + 2))


def _row(row: torch.Tensor) -> str:
    return "[" + " ".join(_element(x) for x in row) + "]"


def _element(x: torch.Tensor) -> str:
    if x.dtype == torch.bool:
        return "T" if bool(x) else "F"
    return f"{float(x):.5g}" if x.is_floating_point() else str(int(x))


def _short(text: str) -> str:
    return text if len(text) <= 4 * MAX_SHOWN else text[: 4 * MAX_SHOWN] + " ..."


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
