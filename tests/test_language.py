"""The package's texts use the field's words: queue, not line; memory or blocks, not room; request, not somebody.

Comments and strings are checked, names of variables are not. The training corpus (`course/assets/glossary` and
`course/assets/prose`) is left as it is: the bundled model was trained on these very words.
"""

from __future__ import annotations

import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "folovllm"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "examples").glob("*.py")])
TEMPLATES = sorted((PACKAGE / "assets" / "replay").iterdir())
EXHIBITS = sorted((PACKAGE / "course" / "museum").glob("*.toml"))
QUOTED = {"file", "old", "new", "killed_by"}  # fields of an exhibit that quote code

# A regular expression -> the plain words. A blank also matches a line break.
PRIVATE = {
    r"(some|any|every)(body|one)(?! of\b)|nobody|who(m)?ever": "request, user, or no / any / every request",
    r"of all who|those who|he who": "the requests that",
    r"wishes": "sampling parameters",
    r"let(s|ting)? go": "free, release",
    r"g(ive|ives|ave|iven|iving) way": "is preempted",
    r"steps? aside": "is preempted",
    r"books": "scheduler state, accounting",
    r"in line(?! (\d|\{|with\b))|waiting line|head of the line": "queue, head of the queue",
    r"(?<!chat.)rooms?": "memory, blocks, budget, space",
    r"pieces?": "chunk, part",
    r"stands?(?! for\b)": "is, are",
}


def found_in(text: str, first_line: int = 1) -> Iterator[tuple[int, str]]:
    """(line, finding) of each private word in a text."""
    for words, plain in PRIVATE.items():
        pattern = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])".replace(" ", r"\s+"), re.IGNORECASE)
        for match in pattern.finditer(text):
            line = first_line + text.count("\n", 0, match.start())
            yield line, f"{' '.join(match.group().split())!r}, in plain words: {plain}"


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and strings of a module. Neighbouring comment lines are one text."""
    kinds = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    comment, start, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type in kinds:
            yield line, token.string
        elif token.type == tokenize.COMMENT:
            if line != last + 1:
                yield start, comment
                comment, start = "", line
            comment, last = f"{comment}\n{token.string[1:]}" if comment else token.string[1:], line
    yield start, comment


def report(file: Path, findings: list[tuple[int, str]]) -> list[str]:
    """Findings as FILE:LINE: WORD, in plain words: ..."""
    return [f"{file.relative_to(ROOT).as_posix()}:{line}: {finding}" for line, finding in sorted(findings)]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_comments_and_strings_use_the_fields_words(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    found = [finding for line, text in prose_of(source) for finding in found_in(text, line)]
    assert report(file, found) == []


@pytest.mark.parametrize("file", TEMPLATES, ids=name_of)
def test_the_replay_page_uses_the_fields_words(file: Path) -> None:
    assert report(file, list(found_in(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("file", EXHIBITS, ids=name_of)
def test_the_museum_uses_the_fields_words(file: Path) -> None:
    tables = {name: table for name, table in tomllib.loads(file.read_text(encoding="utf-8")).items() if name != "topic"}
    texts = {
        f"{name}.{key}": text for name, table in tables.items() for key, text in table.items() if key not in QUOTED
    }
    assert [f"{where}: {finding}" for where, text in texts.items() for _, finding in found_in(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "Somebody waits", "the head of\n    the line", "a request gives way", "there is no room", "in pieces",
        "a free seat for the next in line", "it lets go of its blocks", "whoever comes", "the block stands in a table",
        "one request's wishes", "The scheduler's books", "those who wait",
    ],
)  # fmt: skip
def test_a_private_word_is_found(text: str) -> None:
    assert list(found_in(text))


@pytest.mark.parametrize(
    "text",
    [
        "headroom", "the chat room", "an error in line 3", "f'in line {number}'", "standalone", "a standard",
        "understand", "bookkeeping", "SentencePiece", "stands for", "any one", "a stand-in", "every one of them",
    ],
)  # fmt: skip
def test_an_ordinary_word_is_not(text: str) -> None:
    assert not list(found_in(text))
