"""The glossary that the bundled model knows by heart: its files, its errors, and the prompts made of it."""

from __future__ import annotations

import tomllib
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.course.glossary import default_prompts, load_glossary, load_prose

ENTRY = """
[[entry]]
term = "{0}"
question = "What is {0}?"
answer = "It is {0}."
"""
GOOD = 'topic = "Letters"\n' + ENTRY.format("a") + ENTRY.format("b")


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder


def test_bundled_glossary_is_what_its_files_say() -> None:
    """Read by tomllib alone, file by file: every entry is there, in order, with its topic."""
    folder = Path(str(files("folovllm.course") / "assets" / "glossary"))
    tables = [tomllib.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.toml"))]
    expected = [
        (t["topic"], t.get("listed", True), row["term"], row["question"], row["answer"])
        for t in tables
        for row in t["entry"]
    ]
    assert [(e.topic, e.listed, e.term, e.question, e.answer) for e in load_glossary()] == expected


def test_bundled_glossary_is_large_and_varied() -> None:
    entries = load_glossary()
    assert sum(e.listed for e in entries) >= 150
    assert len({e.answer for e in entries}) == len(entries)
    assert len({e.topic for e in entries}) >= 8
    assert max(len(e.answer) for e in entries) > 10 * min(len(e.answer) for e in entries)


def test_bundled_prose_is_complete_and_in_order() -> None:
    prose = load_prose()
    assert list(prose) == sorted(prose)
    assert len(prose) >= 4
    for name, text in prose.items():
        raw = (files("folovllm.course") / "assets" / "prose" / f"{name}.md").read_text(encoding="utf-8")
        assert text == raw.strip()
        assert len(text.split()) > 300


def test_files_are_read_in_name_order_with_their_defaults(tmp_path: Path) -> None:
    second = 'topic = "Hidden"\nlisted = false\n' + ENTRY.format("c") + 'see = "a"\n'
    third = 'topic = "More"\n' + ENTRY.format("d") + 'see = ["a", "c"]\n'
    entries = load_glossary(write(tmp_path, b_2=second, c_3=third, a_1=GOOD))
    assert [e.term for e in entries] == ["a", "b", "c", "d"]
    assert [e.listed for e in entries] == [True, True, False, True]
    assert [e.see for e in entries] == [(), (), ("a",), ("a", "c")]
    assert [e.topic for e in entries] == ["Letters", "Letters", "Hidden", "More"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topic = ", r"x\.toml: not valid TOML"),
        (ENTRY.format("a"), r"x\.toml: topic must be a non-empty string"),
        ('topic = "T"', r"x\.toml: needs at least one"),
        ('topic = "T"\nlisted = "no"' + ENTRY.format("a"), r"x\.toml: listed must be true or false, got 'no'"),
        ('topic = "T"\nlsited = true' + ENTRY.format("a"), r"x\.toml: unknown field\(s\) \['lsited'\]"),
        ('topic = "T"\nentry = ["a"]', r"x\.toml, entry 1: must be a table"),
        (GOOD + '[[entry]]\nterm = "c"\nquestion = "c?"', r"x\.toml, entry 3 \(c\): answer must be"),
        (GOOD + '[[entry]]\nquestion = "c?"\nanswer = "c."', r"x\.toml, entry 3: term must be"),
        (GOOD + '[[entry]]\nterm = "c"\nquestion = 3\nanswer = "c."', r"entry 3 \(c\): question must be.*got 3"),
        (GOOD + '[[entry]]\nterm = "c"\nquestion = "c?"\nanswer = " c."', r"entry 3 \(c\): answer .*outer whitespace"),
        (GOOD + '[[entry]]\nterm = "c"\nquestion = "c?"\nanswer = ""', r"entry 3 \(c\): answer must be a non-empty"),
        (GOOD + ENTRY.format("c") + "anwser = 1", r"entry 3 \(c\): unknown field\(s\) \['anwser'\]; allowed are"),
        (GOOD + ENTRY.format("c") + "see = 1", r"entry 3 \(c\): see must be"),
        (GOOD + ENTRY.format("c") + 'see = [""]', r"entry 3 \(c\): see must be"),
        (GOOD + ENTRY.format("c") + 'see = ["z"]', r"entry 3 \(c\): see names \['z'\], which are not terms"),
        (GOOD + ENTRY.format("A"), r"entry 3 \(A\): term 'A' is already used by x\.toml, entry 1 \(a\)"),
        (
            GOOD + '[[entry]]\nterm = "c"\nquestion = "what is B"\nanswer = "c."',
            r"entry 3 \(c\): question 'what is B' is already used by x\.toml, entry 2 \(b\)",
        ),
    ],
)
def test_errors_name_file_and_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_glossary(write(tmp_path, x=text))


def test_a_repeat_in_another_file_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"y\.toml, entry 1 \(b\).*used by x\.toml, entry 2 \(b\)"):
        load_glossary(write(tmp_path, x=GOOD, y='topic = "T"' + ENTRY.format("b")))


def test_empty_prose_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.md: the file is empty"):
        load_prose(tmp_path)


@given(st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_default_prompts_spread_evenly(n: int) -> None:
    listed = {e.question: e.topic for e in load_glossary() if e.listed}
    prompts = default_prompts(n)
    assert len(prompts) == n
    assert prompts == default_prompts(n + 7)[:n], "a longer list starts with the shorter one"
    assert set(prompts) <= listed.keys()
    times = Counter(prompts)
    if n:
        assert max(times.values()) == -(-n // len(listed)), "no prompt comes again before all have come"
    topics = len(set(listed.values()))
    assert len({listed[p] for p in prompts[:topics]}) == min(n, topics)


def test_a_negative_number_of_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be 0 or more, got -1"):
        default_prompts(-1)
