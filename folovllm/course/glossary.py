"""The course's glossary: the training data of the bundled model, and the source of example prompts.

The texts are in ``assets/glossary/*.toml`` (questions and answers) and ``assets/prose/*.md`` (plain
paragraphs). A glossary file is one topic::

    topic = "attention"
    listed = true            # optional; false keeps its questions out of `default_prompts`

    [[entry]]
    term = "causal mask"
    question = "What is a causal mask?"
    answer = "..."
    see = ["query", "key"]   # optional: terms of related entries, in any file; one string or several

Everything is read through `importlib.resources`, so it works from a source tree and from an installed wheel.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

_FILE_KEYS = {"topic", "listed", "entry"}
_ENTRY_KEYS = {"term", "question", "answer", "see"}


@dataclass(frozen=True)
class GlossaryEntry:
    """One question and the answer that `folo-tiny` recites for it.

    `see` names the terms of related entries. `listed` is False for entries that are trained on but are
    not example prompts, such as greetings.
    """

    term: str
    question: str
    answer: str
    topic: str
    see: tuple[str, ...] = ()
    listed: bool = True


def load_glossary(folder: Traversable | None = None) -> list[GlossaryEntry]:
    """Every entry of every glossary file, in file-name order and then in the order written.

    `folder` is a folder of ``*.toml`` files; None means the bundled one.
    Raises ValueError, naming file and entry, for bad TOML, a missing, unknown, empty or mistyped field,
    surrounding whitespace, a term or question that occurs twice (ignoring case and closing punctuation), or a
    `see` that names no term.
    """
    folder = _assets("glossary") if folder is None else folder
    entries: list[GlossaryEntry] = []
    places: list[str] = []
    first_seen: dict[tuple[str, str], str] = {}
    for file in _sorted_files(folder, ".toml"):
        for where, entry in _read_topic(file):
            for kind, text in (("term", entry.term), ("question", entry.question)):
                key = (kind, text.casefold().rstrip("?!. "))
                if key in first_seen:
                    raise ValueError(f"{where}: {kind} {text!r} is already used by {first_seen[key]}")
                first_seen[key] = where
            entries.append(entry)
            places.append(where)
    terms = {entry.term for entry in entries}
    for where, entry in zip(places, entries, strict=True):
        if unknown := [term for term in entry.see if term not in terms]:
            raise ValueError(f"{where}: see names {unknown}, which are not terms of the glossary")
    return entries


def load_prose(folder: Traversable | None = None) -> dict[str, str]:
    """The plain-text passages, ``{file stem: text}`` in file-name order, stripped of outer whitespace.

    `folder` is a folder of ``*.md`` files; None means the bundled one. Raises ValueError for an empty file.
    """
    folder = _assets("prose") if folder is None else folder
    prose: dict[str, str] = {}
    for file in _sorted_files(folder, ".md"):
        text = file.read_text(encoding="utf-8").strip()
        if not text:
            raise ValueError(f"{file.name}: the file is empty")
        prose[file.name.removesuffix(".md")] = text
    return prose


def default_prompts(n: int) -> list[str]:
    """`n` example questions, the same on every call: one of each topic in turn, then the next of each.

    Only `listed` entries are used. If `n` exceeds their number, the sequence starts over.
    Raises ValueError for a negative `n`.
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    by_topic: dict[str, list[str]] = {}
    for entry in load_glossary():
        if entry.listed:
            by_topic.setdefault(entry.topic, []).append(entry.question)
    longest = max(map(len, by_topic.values()), default=0)
    spread = [questions[i] for i in range(longest) for questions in by_topic.values() if i < len(questions)]
    if n and not spread:
        raise ValueError("the glossary has no listed entry for prompts")
    return [spread[i % len(spread)] for i in range(n)]


def _assets(kind: str) -> Traversable:
    return files("folovllm.course") / "assets" / kind


def _sorted_files(folder: Traversable, suffix: str) -> list[Traversable]:
    return sorted((f for f in folder.iterdir() if f.name.endswith(suffix)), key=lambda f: f.name)


def _read_topic(file: Traversable) -> Iterator[tuple[str, GlossaryEntry]]:
    """Yield ("FILE, entry N (TERM)", entry) for each entry of one file."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name}: not valid TOML: {error}") from error
    _refuse_unknown(data, _FILE_KEYS, file.name)
    topic = _text(data, "topic", file.name)
    listed = data.get("listed", True)
    if not isinstance(listed, bool):
        raise ValueError(f"{file.name}: listed must be true or false, got {listed!r}")
    rows = data.get("entry", [])
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file.name}: needs at least one [[entry]]")
    for number, row in enumerate(rows, start=1):
        where = f"{file.name}, entry {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a table, got {row!r}")
        if isinstance(row.get("term"), str):
            where += f" ({row['term']})"
        _refuse_unknown(row, _ENTRY_KEYS, where)
        yield (
            where,
            GlossaryEntry(
                term=_text(row, "term", where),
                question=_text(row, "question", where),
                answer=_text(row, "answer", where),
                topic=topic,
                see=_pointers(row.get("see", []), where),
                listed=listed,
            ),
        )


def _refuse_unknown(table: Mapping[str, object], allowed: set[str], where: str) -> None:
    if unknown := sorted(table.keys() - allowed):
        raise ValueError(f"{where}: unknown field(s) {unknown}; allowed are {sorted(allowed)}")


def _text(table: Mapping[str, object], field: str, where: str) -> str:
    value = table.get(field)
    if not isinstance(value, str) or not value or value != value.strip():
        raise ValueError(f"{where}: {field} must be a non-empty string without outer whitespace, got {value!r}")
    return value


def _pointers(value: object, where: str) -> tuple[str, ...]:
    pointers = [value] if isinstance(value, str) else value
    if not isinstance(pointers, list) or not all(isinstance(p, str) and p.strip() for p in pointers):
        raise ValueError(f"{where}: see must be a string or a list of non-empty strings, got {value!r}")
    return tuple(pointers)
