"""examples/hello.py: the first program that a reader sees."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from folovllm.course.glossary import load_glossary

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hello.py"


def test_ten_lines_answer_from_the_glossary(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))
    (answer,) = [entry.answer for entry in load_glossary() if entry.term == "KV cache"]
    assert capsys.readouterr().out.strip() == answer
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 10
