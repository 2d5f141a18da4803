"""Lets docstrings list their fields as plain text, and shows such a list as one.

In the sources a class or function describes its fields like this, which reads well in an editor::

    top_k: sample from the k likeliest tokens; 0 is off.
    logprobs: report, with each output token, the log probabilities
        of this many likeliest tokens.

In reStructuredText the same lines are one paragraph with a stray indentation. Here a paragraph becomes a definition
list if each of its entries starts with names of fields or parameters of the object that is described.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.+)")


def field_names(described: object) -> set[str]:
    """What an entry of a list may be called: the dataclass's fields, or the parameters of the call."""
    if dataclasses.is_dataclass(described):
        return {field.name for field in dataclasses.fields(described)}
    try:
        return set(inspect.signature(described).parameters) if callable(described) else set()
    except ValueError:  # a builtin without a signature
        return set()


def as_list(paragraph: list[str], known: set[str]) -> list[str]:
    """The paragraph as a definition list, or unchanged where it is none."""
    out: list[str] = []
    for line in paragraph:
        if line.startswith(" ") and out:
            out.append(f"    {line.strip()}")
            continue
        entry = ENTRY.fullmatch(line)
        if entry is None or not known.issuperset(entry["names"].split(", ")):
            return paragraph
        out += [", ".join(f"``{name}``" for name in entry["names"].split(", ")), f"    {entry['text']}"]
    return out


def on_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrites `lines` in place, as autodoc wants it."""
    known = field_names(obj)
    paragraphs = [list(group) for _, group in groupby(lines, key=lambda line: bool(line.strip()))]
    lines[:] = [line for paragraph in paragraphs for line in as_list(paragraph, known)]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
