"""The line of a name in the sources: what {src} links to, looked up when the course is built."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def line_of(path: str, name: str = "") -> int | None:
    """The line on which `name` ("function", "Class.method" or "CONSTANT") begins in a Python file; None without one.

    Raises LookupError if there is no such file or no such name in it.
    """
    file = ROOT / path
    if not file.is_file():
        raise LookupError(f"{path} does not exist")
    if not name:
        return None
    statements: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    line = None
    for part in name.split("."):
        found = next((statement for statement in statements if part in names_of(statement)), None)
        if found is None:
            raise LookupError(f"{path} has no {name}")
        line, statements = found.lineno, getattr(found, "body", [])
    return line


def names_of(statement: ast.stmt) -> Iterator[str]:
    """What a statement gives a name to."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        targets = (name for target in statement.targets for name in ast.walk(target))
        yield from (name.id for name in targets if isinstance(name, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id
