"""Helpers for notebooks: tables that every viewer renders, and progress bars that leave one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

from tqdm import tqdm

_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?x?( ?(%|[a-zA-Zµ]+(/s)?))?")


class MarkdownTable:
    """Rows under a header. A notebook shows it as a table; printed, it is aligned text.

    Cells are shown as `str` gives them. A column of numbers, with or without units, is right-aligned. Raises ValueError
    for a row of another length than the header.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        wrong = [row for row in rows if len(row) != len(header)]
        if wrong:
            raise ValueError(f"row {wrong[0]!r} has {len(wrong[0])} cells; allowed: {len(header)}, one per column")
        self.header = [str(cell) for cell in header]
        self.rows = [[str(cell) for cell in row] for row in rows]
        self._right = [
            bool(self.rows) and all(_NUMBER.fullmatch(row[column]) for row in self.rows)
            for column in range(len(header))
        ]

    def _repr_markdown_(self) -> str:
        """The table in Markdown (IPython's protocol)."""
        rule = ["---:" if right else ":---" for right in self._right]
        lines = [self.header, rule, *([_escape(cell) for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self._right, strict=True)
            ).rstrip()
            for row in [self.header, *self.rows]
        ]
        return "\n".join(lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def progress(iterable: Iterable[Any] | None = None, desc: str = "", total: int | None = None) -> tqdm[Any]:
    """A tqdm bar over `iterable`, or one of `total` to `update` by hand.

    In a notebook it is one line of text that is replaced in place, so only its last state is saved. Elsewhere it is an
    ordinary bar on stderr.
    """
    kind = _LineBar if "ipykernel" in sys.modules else tqdm
    return kind(cast("Iterable[Any]", iterable), desc=desc, total=total, mininterval=0.5)


class _LineBar(tqdm):
    """A bar whose line is an output of the cell, with a display id by which it is replaced."""

    def __init__(self, iterable: Iterable[Any], **kwargs: Any) -> None:
        from IPython.display import display

        self._line: Any = None
        self._show = display
        super().__init__(iterable, file=io.StringIO(), ncols=72, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Replace the line. tqdm passes an empty `msg` to remove a bar; this one stays."""
        if msg == "":
            return
        text = {"text/plain": str(self)}
        if self._line is None:
            self._line = self._show(text, raw=True, display_id=True)
        else:
            self._line.update(text, raw=True)

    def close(self) -> None:
        """Show the final state and end."""
        if not self.disable:
            self.display()
        super().close()
