"""Numbers in the README, on milestone pages and in labs: each marked one is the ledger's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from claims import marks  # noqa: E402
from claims.ledger import ClaimError  # noqa: E402


@pytest.mark.parametrize("path", marks.files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_stands_between_marks_is_what_the_ledger_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert marks.fill(text) == text, "run: python docs/fill_numbers.py"


def test_some_numbers_are_marked_on_every_kind_of_page() -> None:
    marked = {path: marks.marked_ids(path.read_text(encoding="utf-8")) for path in marks.files()}
    assert marked[ROOT / "README.md"]
    for kind in (".py", ".md"):
        assert any(ids for path, ids in marked.items() if path.suffix == kind and path.parent != ROOT)


def test_a_number_is_filled_in() -> None:
    text = "takes <!-- claim: kv-bytes-llama2-7b -->something\nelse<!-- /claim --> per token"
    filled = "takes <!-- claim: kv-bytes-llama2-7b -->512 KiB<!-- /claim --> per token"
    assert marks.fill(text) == marks.fill(filled) == filled
    assert marks.marked_ids(text) == ["kv-bytes-llama2-7b"]


def test_a_measured_number_is_filled_in() -> None:
    page = "<!-- measured: m0-cache-folo-tiny/kv_bytes|, -->?<!-- /measured --> bytes"
    assert marks.fill(page) == page.replace("?", "555,008")
    with pytest.raises(ClaimError, match="has no gone"):
        marks.fill("<!-- measured: m0-cache-folo-tiny/gone|, -->?<!-- /measured -->")


def test_a_table_is_filled_in() -> None:
    filled = marks.fill("a\n<!-- table: recompute-ratios -->\nold\n<!-- /table -->\nb")
    lines = filled.splitlines()
    assert [lines[0], lines[1], *lines[-2:]] == ["a", "<!-- table: recompute-ratios -->", "<!-- /table -->", "b"]
    assert "| 100 | 50.5 | 67 |" in lines and "old" not in lines
    assert marks.fill(filled) == filled


@pytest.mark.parametrize(
    "text",
    [
        "<!-- claim: kv-bytes-llama2-7b -->512 KiB",
        "512 KiB<!-- /claim -->",
        "<!-- claim: kv-bytes-llama2-7b --><!-- claim: kv-bytes-llama2-7b -->1<!-- /claim -->",
        "<!-- claim: kv-bytes-llama2-7b -->512 KiB<!-- /table -->",
        "<!-- claim -->512 KiB<!-- /claim -->",
    ],
)
def test_a_mark_without_its_other_half_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: <!-- "):
        marks.fill(text)


def test_an_unknown_id_is_an_error() -> None:
    with pytest.raises(ClaimError, match="'no-such-id'"):
        marks.fill("<!-- claim: no-such-id -->1<!-- /claim -->")
    with pytest.raises(ClaimError, match="'no-such-table'"):
        marks.fill("<!-- table: no-such-table -->\n<!-- /table -->")
