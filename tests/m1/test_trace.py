"""The record of a run: what it says must be what was done, and Perfetto must be able to read it."""

from __future__ import annotations

import json

from folovllm import LLM, SamplingParams
from folovllm.engine.trace import EngineStats
from tests.mock import mock_engine


def run(n: int = 1):
    engine = mock_engine()
    wishes = SamplingParams(max_tokens=4, ignore_eos=True, n=n, seed=0)
    outputs = engine.generate_batch([[1, 2, 3], [4, 5, 6, 7]], wishes)
    return engine, outputs


def test_steps_tell_the_life_of_each_request():
    engine, _ = run()
    rows = [
        (r.request_id, r.num_scheduled, r.num_prompt, r.num_computed, r.num_output)
        for s in engine.trace
        for r in s.requests
    ]
    assert rows == [
        ("0", 3, 3, 3, 1), ("0", 1, 0, 4, 2), ("0", 1, 0, 5, 3), ("0", 1, 0, 6, 4),
        ("1", 4, 4, 4, 1), ("1", 1, 0, 5, 2), ("1", 1, 0, 6, 3), ("1", 1, 0, 7, 4),
    ]  # fmt: skip
    assert [s.finished for s in engine.trace if s.finished] == [["0"], ["1"]]
    assert [s.step for s in engine.trace] == list(range(8))
    assert [(s.num_waiting, s.num_running) for s in engine.trace] == [(1, 1)] * 3 + [(1, 0)] + [(0, 1)] * 3 + [(0, 0)]
    assert engine.trace[0].requests[0].status == "RUNNING"
    assert engine.trace[3].requests[0].status == "FINISHED_LENGTH_CAPPED"


def test_stats_are_the_sums_of_the_steps():
    engine, outputs = run(n=2)
    again = EngineStats()
    for step in engine.trace:
        again.add(step)
    assert again == engine.stats
    stats = engine.stats
    assert stats.generated_tokens == sum(len(c.token_ids) for o in outputs.values() for c in o.outputs) == 16
    assert stats.prompt_tokens_computed == 2 * 3 + 2 * 4
    assert stats.steps == stats.forwards == 16 and stats.max_running == 1
    stats.reset()
    assert stats == EngineStats()


def test_kv_usage_is_recorded_as_reserved_and_used():
    engine, _ = run()
    assert [(s.kv.reserved, s.kv.used) for s in engine.trace][:4] == [(64, 3), (64, 4), (64, 5), (0, 0)]


def test_phases_of_a_step_follow_one_another():
    engine, _ = run()
    engine.trace[0].phases  # noqa: B018
    for step in engine.trace:
        assert list(step.phases) == ["schedule", "prepare", "forward", "sample", "update"]
        assert step.phases["schedule"][1] <= step.phases["update"][0]
        assert step.duration > 0


def test_the_trace_is_bounded_and_says_what_it_dropped():
    engine = mock_engine()
    engine.core.recorder.trace = type(engine.core.trace)(3)
    engine.generate_batch([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(engine.trace) == 3 and engine.trace.dropped == 5
    assert [s.step for s in engine.trace] == [5, 6, 7]
    none = mock_engine()
    none.core.recorder.trace = type(none.core.trace)(0)
    none.generate_batch([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(none.trace) == 0 and none.stats.steps == 8


def test_json_and_chrome_traces_can_be_read_back(tmp_path):
    engine, _ = run()
    plain = json.loads(engine.trace.save(tmp_path / "trace.json").read_text())
    assert plain["dropped"] == 0 and len(plain["steps"]) == 8
    assert plain["steps"][0]["requests"][0]["num_prompt"] == 3
    chrome = json.loads(engine.trace.save(tmp_path / "chrome.json", chrome=True).read_text())
    events = chrome["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    # The trace event format: complete events need name, ts, dur (microseconds), pid and tid.
    assert all({"name", "ts", "dur", "pid", "tid"} <= set(e) and e["dur"] >= 0 for e in spans)
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert sorted(names.values()) == ["engine step", "request 0", "request 1"]
    per_request = [e for e in spans if names[e["tid"]] == "request 1"]
    assert [e["name"] for e in per_request] == ["prefill", "decode", "decode", "decode"]
    first = engine.trace[0].phases["schedule"][0]
    assert per_request[0]["ts"] == (engine.trace[4].phases["schedule"][0] - first) * 1e6
    assert {e["name"] for e in events if e["ph"] == "C"} == {"scheduled tokens", "running"}


def test_an_empty_trace_is_still_a_trace(tmp_path):
    engine = mock_engine()
    assert json.loads(engine.trace.save(tmp_path / "e.json", chrome=True).read_text())["traceEvents"] == []


def test_what_is_ended_from_outside_is_told_by_the_next_step_not_by_one_that_never_had_it():
    engine = mock_engine()
    wishes = SamplingParams(max_tokens=9, ignore_eos=True)
    for i in ("a", "b", "c"):
        engine.add_request(i, [1, 2], wishes)
    engine.step()
    engine.abort_request(["a", "b"])
    engine.step()
    assert engine.trace[0].finished == [] and engine.trace[0].requests[0].status == "RUNNING"
    assert engine.trace[1].aborted == ["a", "b"] and engine.trace[1].requests[0].request_id == "c"


def test_a_stop_string_ends_its_request_in_the_step_that_brought_it():
    """The core learns of it after the step: the record must say so all the same."""
    llm = LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu", max_model_len=256)
    (output,) = llm.generate(["A block"], SamplingParams(temperature=0, max_tokens=40, stop=" "), use_tqdm=False)
    assert output.outputs[0].stop_reason == " "
    last = llm.engine.trace[-1]
    assert last.finished == [output.request_id] and last.num_running == 0
    assert last.requests[0].status == "FINISHED_STOPPED"
    assert last.kv.reserved == last.kv.used == 0
