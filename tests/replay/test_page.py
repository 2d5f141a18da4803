"""A page is one file with nothing in it but what was recorded, and no text can break out of its place."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.course.replay import page as page_module
from folovllm.course.replay.load import check_recording, load_recording
from folovllm.course.replay.page import replay_page, write_page
from folovllm.engine.recording import recording
from tests.mock import drain, paged_mock_engine
from tests.replay.runs import crowded_run, data_of, engine_like, replays, scripts_of

NASTY = [
    "</script><script>alert(1)</script>",
    "<b>bold</b>",
    "<!-- recording -->",
    "a&amp;b",
    'quo"te',
    "\u2028",
    "{x}",
]


def nasty_run() -> dict[str, Any]:
    """Ids, prompts and a model's name that would break a page that does not escape them."""
    llm = LLM("folo-tiny", "m4", dtype="float32", device="cpu", num_kv_blocks=64, max_model_len=256)
    with recording(llm.engine, times=False) as recorder:
        for text in NASTY:
            llm.engine.add_request(text, f"Say {text} again", SamplingParams(max_tokens=3))
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
    data = recorder.to_json()
    data["engine"]["model"] = NASTY[0]
    return data


@pytest.fixture(scope="module")
def nasty() -> dict[str, Any]:
    return nasty_run()


def test_no_text_can_leave_its_place(nasty: dict[str, Any]) -> None:
    page = replay_page(nasty)
    found, plain = (
        scripts_of(page),
        scripts_of(replay_page({**nasty, "texts": [], "engine": {"model": "", "milestone": ""}})),
    )
    assert len(found.scripts) == 2 and found.tags == plain.tags
    assert data_of(page) == nasty
    assert [request["id"] for request in nasty["requests"]] == NASTY


def test_a_page_loads_nothing() -> None:
    data = crowded_run("m3")[0]
    page = replay_page(data)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttpRequest|\bimport\b *[({'\"]|src=", page)
    assert "default-src 'none'" in page
    assert re.findall(r"\.innerHTML|\.outerHTML|insertAdjacentHTML|document\.write|\beval\(", page) == []


def test_a_title_of_ones_own_is_text() -> None:
    page = replay_page(crowded_run("m2")[0], "<i>mine</i> <!-- scripts -->")
    assert "<i>mine" not in page and page.count("&lt;i&gt;mine&lt;/i&gt; &lt;!-- scripts --&gt;") == 2


def test_a_surrogate_in_an_id_does_not_stop_the_page(tmp_path: Path) -> None:
    engine = engine_like("m2")
    with recording(engine) as recorder:
        engine.add_request("\ud800", [1], SamplingParams(max_tokens=1))
        drain(engine)
    assert write_page(recorder.to_json(), tmp_path / "page.html").read_text(encoding="utf-8")
    assert load_recording(recorder.save(tmp_path / "trace.json"))["requests"][0]["id"] == "\ud800"


def test_two_hundred_steps_with_many_requests_take_less_than_a_megabyte(tmp_path: Path) -> None:
    engine = paged_mock_engine(
        max_num_seqs=64, budget=512, max_model_len=600, num_blocks=2048, block_size=16, chunked_prefill=True
    )
    with recording(engine) as recorder:
        for i in range(64):
            engine.add_request(f"request-{i}", [1 + (i * j) % 60 for j in range(200)],
                               SamplingParams(max_tokens=170 + i % 8, ignore_eos=True))  # fmt: skip
        drain(engine)
    data = recorder.to_json()
    assert len(data["steps"]) >= 200 and max(step["running"] for step in data["steps"]) == 64
    assert write_page(data, tmp_path / "page.html").stat().st_size < 1_000_000


def test_the_scripts_are_all_there() -> None:
    folder = Path(page_module.__file__).parents[2] / "assets" / "replay"
    assert {file.name for file in folder.glob("*.js")} == set(page_module.SCRIPTS)
    assert [file.name for file in folder.iterdir() if len(file.read_text().splitlines()) > 400] == []


# --- the site's replays --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", replays.RUNS)
def test_the_sites_replays_show_what_the_page_says(name: str) -> None:
    data = replays.recorded(name)
    check_recording(data)
    steps = data["steps"]
    assert data["engine"]["milestone"] == name and len(steps) <= 200
    assert len(replays.page(name).encode()) < 1_000_000
    prefills = [[isinstance(share, list) and share[2] > 0 for share in step.get("shares", ())] for step in steps]
    changes = [step.get("blocks", {}) for step in steps]
    if name == "m1":
        assert all(len(kinds) == 1 for kinds in prefills) and sum(map(sum, prefills)) == 3
    if name == "m2":
        assert max(map(len, prefills)) == 4 and len(data["requests"]) == 10
        assert any(
            any(kinds) and not all(kinds) and step.get("padding") for kinds, step in zip(prefills, steps, strict=True)
        )
    if name == "m3":
        ops = Counter(op[0] for step in steps for op in step.get("ops", ()))
        assert ops["copy"] and ops["out"] and ops["in"] and any(step.get("preempted") for step in steps)
    if name == "m4":
        document = next(i for i, request in enumerate(data["requests"]) if request["id"] == "doc")
        chunks = [
            s for step in steps for s in step.get("shares", ()) if isinstance(s, list) and s[0] == document and s[2]
        ]
        found = [s for step in steps for s in step.get("shares", ()) if isinstance(s, list) and s[3] > 0]
        assert len(chunks) > 3 and len(found) >= 5 and any(change.get("evicted") for change in changes)
