"""A recording comes back from its file as it was, and whatever else is in a file is refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import load_glossary
from folovllm.course.replay.load import check_recording, load_recording
from folovllm.engine.recording import KEY, recording
from folovllm.entrypoints.cli import app
from tests.mock import drain
from tests.replay.runs import SMALL, crowd, crowded_run, data_of, engine_like


@pytest.fixture(scope="module")
def crowded() -> dict[str, Any]:
    return crowded_run("m4")[0]


def test_a_trace_file_holds_chrome_events_and_the_recording(tmp_path: Path) -> None:
    engine = engine_like("m4", **SMALL)
    with recording(engine) as recorder:
        crowd(engine, 4)
        drain(engine)
    file = recorder.save(tmp_path / "trace.json")
    data = json.loads(file.read_text())
    events = json.loads(json.dumps(engine.trace.to_chrome_trace()["traceEvents"]))
    assert next(iter(data)) == "traceEvents" and data["traceEvents"] == events
    assert load_recording(file) == recorder.to_json() == data[KEY]


def damaged(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at "steps.0.shares", or none."""
    made = copy.deepcopy(data)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = made
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


DAMAGES = [
    ("schema", "another", "has no recording"),
    ("version", 2, "version=2 is not valid; allowed: 1"),
    ("engine", [], r"engine=\[\] is not valid; allowed: an object"),
    ("engine.block_size", 0, "engine.block_size=0"),
    ("engine.num_blocks", 10**30, "engine.num_blocks="),
    ("engine.model", None, "engine.model is missing"),
    ("texts", "abc", "texts='abc' is not valid; allowed: a list"),
    ("texts.0", 5, r"texts\[0\]=5"),
    ("prompts.0.0", 10**6, r"prompts\[0\]\[0\]=1000000"),
    ("requests.0.prompt", -1, r"requests\[0\].prompt=-1"),
    ("requests.0.id", 7, r"requests\[0\].id=7"),
    ("steps", [], "has no steps"),
    ("steps.0", 3, r"steps\[0\]=3"),
    ("steps.0.kv", [1, 2], r"steps\[0\].kv=\[1, 2\]"),
    ("steps.0.step", True, r"steps\[0\].step=True"),
    ("steps.0.running", 1.5, r"steps\[0\].running=1.5"),
    ("steps.0.shares", {"a": 1}, r"steps\[0\].shares="),
    ("steps.0.shares.0", 999, r"steps\[0\].shares\[0\]=999"),
    ("steps.0.shares.0", [0, 1, 0, 0, 1, 9999], r"steps\[0\].shares\[0\]\[5\]=9999"),
    ("steps.0.shares.0", [0, 1], r"steps\[0\].shares\[0\]=\[0, 1\]"),
    ("steps.0.line", [-1], r"steps\[0\].line\[0\]=-1"),
    ("steps.0.ops", [["burn", 1, 2]], r"steps\[0\].ops\[0\]="),
    ("steps.0.ops", [["copy", 1, "2"]], r"steps\[0\].ops\[0\]\[2\]='2'"),
    ("steps.0.times", [1, 2], r"steps\[0\].times="),
    ("steps.0.blocks.tables", [[0, 0, [10**6]]], r"steps\[0\].blocks.tables\[0\]\[2\]\[0\]="),
    ("steps.0.blocks.taken", "12", r"steps\[0\].blocks.taken="),
    ("start", 5, "start=5"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGES, ids=[f"{p}={v!r:.20}" for p, v, _ in DAMAGES])
def test_a_damaged_recording_is_refused(crowded: dict[str, Any], path: str, value: Any, message: str) -> None:
    check_recording(crowded)
    with pytest.raises(ValueError, match=message):
        check_recording(damaged(crowded, path, value))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_gets_through_as_another_error(crowded: dict[str, Any], data: st.DataObject) -> None:
    """Whatever stands where, it is a ValueError or a recording."""
    wrong = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2),
                      st.floats(), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1))  # fmt: skip
    made: Any = copy.deepcopy({**crowded, "steps": crowded["steps"][:4], "texts": crowded["texts"][:50]})
    place = made
    for _ in range(data.draw(st.integers(0, 5))):
        inner = [
            k for k in (place if isinstance(place, dict) else range(len(place))) if isinstance(place[k], dict | list)
        ]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if keys:
        place[data.draw(st.sampled_from(keys))] = data.draw(wrong)
    try:
        check_recording(made)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"not json", "is not JSON, or is truncated"),
        (b'{"traceEvents": [', "is not JSON, or is truncated"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "has no recording; `folovllm generate --trace FILE` writes one"),
        (b'"text"', "has no recording"),
        (b'{"traceEvents": [], "displayTimeUnit": "ms"}', "has no recording"),
        (b'{"folovllm": {"schema": "folovllm-recording", "version": 9}}', "version=9 is not valid; allowed: 1"),
        (b'{"folovllm": {"schema": "folovllm-recording", "version": 1}}', "engine is missing"),
    ],
)
def test_a_bad_trace_is_one_line_and_status_2(tmp_path: Path, content: bytes | None, message: str) -> None:
    trace = tmp_path / "trace.json"
    if content is not None:
        trace.write_bytes(content)
    result = invoke("replay", trace)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.output.split())
    assert [file.name for file in tmp_path.iterdir()] == ([] if content is None else ["trace.json"])


def test_a_truncated_trace_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    engine = engine_like("m3", **SMALL)
    with recording(engine) as recorder:
        crowd(engine, 2)
        drain(engine)
    whole = recorder.save(tmp_path / "whole.json").read_bytes()
    for share in range(1, 20):
        (tmp_path / "cut.json").write_bytes(whole[: share * len(whole) // 20])
        with pytest.raises(ValueError, match="is truncated"):
            load_recording(tmp_path / "cut.json")


def test_where_a_page_cannot_go_it_says_so(tmp_path: Path, crowded: dict[str, Any]) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({KEY: crowded}))
    for out in (tmp_path / "missing" / "page.html", tmp_path):
        result = invoke("replay", trace, "--out", out)
        assert result.exit_code == 2 and "allowed: a file in a folder that exists" in " ".join(result.output.split())
    result = invoke("replay", trace, "--out", trace)
    assert result.exit_code == 2 and "is the trace itself" in result.output
    assert load_recording(trace) == json.loads(json.dumps(crowded))


def test_generate_records_and_replay_makes_a_page(tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    question = next(entry.question for entry in load_glossary())
    options = ("--max-tokens", 6, "--num-kv-blocks", 16, "--max-num-batched-tokens", 8, "--dtype", "float32")
    result = invoke("generate", question, *options, "--trace", trace)
    assert result.exit_code == 0, result.output
    assert f"folovllm replay {trace}" in result.output
    result = invoke("replay", trace)
    assert result.exit_code == 0 and "Open it in a browser" in result.output
    data = data_of((tmp_path / "t.html").read_text(encoding="utf-8"))
    assert data == load_recording(trace)
    assert data["engine"]["milestone"] == "m4" and data["engine"]["max_num_batched_tokens"] == 8
    assert all("blocks" in step for step in data["steps"][:2])


def test_a_run_is_saved_after_the_fact(tmp_path: Path) -> None:
    llm = LLM("folo-tiny", "m1", dtype="float32", device="cpu")
    llm.generate("A block", SamplingParams(max_tokens=3), use_tqdm=False)
    data = load_recording(llm.save_trace(tmp_path / "trace.json"))
    assert data["engine"]["milestone"] == "m1" and len(data["steps"]) == len(llm.engine.trace)
