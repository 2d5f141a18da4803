"""What is recorded is what happened: every step is held against the engine's own trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from folovllm import LLM, SamplingParams
from folovllm.course.replay.load import check_recording
from folovllm.course.viz.live import watching
from folovllm.engine.pool_changes import free_list_changes
from folovllm.engine.recording import Recorder, record, recording, token_texts
from folovllm.engine.trace import PHASES, StepTrace
from folovllm.kv_cache.interface import BlockCopy, BlockSnapshot
from folovllm.models.loader import load_tokenizer, resolve_model
from folovllm.request import RequestStatus
from tests.mock import drain, paged_mock_engine
from tests.replay.runs import KINDS, SMALL, crowd, crowded_run, engine_like


class Player:
    """The recording, put together again by this test, from what its format is said to be."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.ids = [request["id"] for request in data["requests"]]
        self.tables: dict[int, list[int]] = {}
        self.host: dict[int, list[int]] = {}
        self.line = list(range(1, (data["engine"]["num_blocks"] or 0) + 1))
        self.cached: dict[int, int | None] = {}
        begun = {i: request["begun"] for i, request in enumerate(data["requests"]) if "begun" in request}
        self.counts: dict[int, tuple[int, int]] = {i: (computed, output) for i, (_, computed, output) in begun.items()}
        self.change(data["start"])

    def change(self, changes: dict[str, Any]) -> None:
        for name, tables in (("tables", self.tables), ("host", self.host)):
            for place, kept, tail in changes.get(name, ()):
                tables[place] = tables.get(place, [])[:kept] + tail
                if not tables[place]:
                    del tables[place]
        self.line = [block for block in self.line if block not in changes.get("taken", ())] + changes.get("freed", [])
        for block in changes.get("uncached", ()):
            del self.cached[block]
        self.cached |= dict(changes.get("cached", ()))

    def shares(self, step: dict[str, Any]) -> list[tuple[Any, ...]]:
        made = []
        for row in step.get("shares", ()):
            if isinstance(row, int):
                computed, output = self.counts[row]
                row = [row, 1, 0, 0, computed + 1, output + 1]
            place, *numbers = row
            self.counts[place] = (numbers[3], numbers[4])
            reason = numbers[5] if len(numbers) > 5 else None
            made.append((self.ids[place], *numbers[:5], reason))
        return made

    def named(self, tables: dict[int, list[int]]) -> dict[str, tuple[int, ...]]:
        return {self.ids[place]: tuple(blocks) for place, blocks in tables.items()}


def check_against_trace(data: dict[str, Any], trace: list[StepTrace]) -> None:
    """Every step that was recorded is the step that the engine traced."""
    player = Player(data)
    assert [step["step"] for step in data["steps"]] == [step.step for step in trace]
    before: BlockSnapshot | None = None
    for made, step in zip(data["steps"], trace, strict=True):
        expected = [
            (r.request_id, r.num_scheduled, r.num_prompt, r.num_cached, r.num_computed, r.num_output,
             RequestStatus[r.status].finish_reason)
            for r in step.requests
        ]  # fmt: skip
        assert player.shares(made) == expected
        assert [player.ids[i] for i in made.get("line", ())] == step.next_in_line
        assert [player.ids[i] for i in made.get("preempted", ())] == step.preempted
        assert [player.ids[i] for i in made.get("aborted", ())] == step.aborted
        assert (made["running"], made["waiting"]) == (step.num_running, step.num_waiting)
        assert made["kv"] == [step.kv.reserved, step.kv.used, step.kv.unshared]
        assert [op[1:] for op in made.get("ops", ()) if op[0] == "copy"] == [
            [op.src, op.dst] for op in step.kv_ops if isinstance(op, BlockCopy)
        ]
        if step.blocks is None:
            continue
        player.change(made.get("blocks", {}))
        assert player.named(player.tables) == step.blocks.tables
        assert player.named(player.host) == step.blocks.host_tables
        assert tuple(player.line) == step.blocks.free
        assert player.cached == step.blocks.cached
        evicted = made.get("blocks", {}).get("evicted", [])
        if before is not None:
            more = [new - old for old, new in zip(before.evictions, step.blocks.evictions, strict=True)]
            assert evicted == [block for block, count in enumerate(more) if count]
        before = step.blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_is_what_the_engine_traced(kind: str) -> None:
    data, trace = crowded_run(kind)
    check_recording(data)
    check_against_trace(data, trace)
    if kind != "m2":
        assert any(step.preempted for step in trace) and any(
            op[0] == "copy" for s in data["steps"] for op in s.get("ops", ())
        )
    if kind.startswith("m4"):
        assert any(step.get("blocks", {}).get("evicted") for step in data["steps"])


def test_who_comes_back_is_written_out_in_full() -> None:
    # The page, if it has no blocks to look at, takes all K/V of preempted requests for dropped.
    data, trace = crowded_run("m3-swap")
    away: set[int] = set()
    for made in data["steps"]:
        assert not away & {row for row in made.get("shares", ()) if isinstance(row, int)}
        away -= {row[0] for row in made.get("shares", ()) if isinstance(row, list)}
        away |= set(made.get("preempted", ()))
    assert sum(len(step.preempted) for step in trace) > 2


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=8),
    num_blocks=st.integers(12, 30),
    swap=st.booleans(),
    caching=st.booleans(),
)
def test_any_run_is_recorded_as_it_was(
    requests: list[tuple[int, int, int]], num_blocks: int, swap: bool, caching: bool
) -> None:
    mode = {"preemption_mode": "swap", "num_host_blocks": 24} if swap else {}
    engine = engine_like("m4", num_blocks=num_blocks, budget=20, max_model_len=40, caching=caching, **mode)
    with recording(engine) as recorder:
        for i, (length, output, n) in enumerate(requests):
            params = SamplingParams(max_tokens=output, n=n, temperature=1.0, seed=i)
            engine.add_request(str(i), [5] * (length // 2) + [i + 1] * (length - length // 2), params)
        drain(engine)
    check_recording(recorder.to_json())
    check_against_trace(recorder.to_json(), list(engine.trace))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changes_of_a_line_lead_from_one_to_the_other(data: st.DataObject) -> None:
    before = data.draw(st.permutations(range(8)))[: data.draw(st.integers(0, 8))]
    gone = data.draw(st.sets(st.sampled_from(before))) if before else set()
    joining = [b for b in range(8) if b in gone or b not in before]
    after = [b for b in before if b not in gone] + data.draw(st.permutations(joining))[: data.draw(st.integers(0, 8))]
    taken, freed = free_list_changes(before, after)
    assert [block for block in before if block not in taken] + freed == after


def test_a_recording_after_the_fact_is_the_one_made_meanwhile() -> None:
    engine = engine_like("m4", **SMALL)
    with recording(engine) as recorder:
        crowd(engine)
        drain(engine)
    assert record(engine).to_json() == recorder.to_json()


def test_a_recording_may_begin_in_the_middle() -> None:
    engine = engine_like("m4", **SMALL)
    crowd(engine)
    while not (engine.trace and engine.trace[-1].preempted):
        engine.step()
    first = len(engine.trace)
    status = {i: r.status.name for i, r in engine.core.scheduler.requests.items()}
    with recording(engine) as recorder:
        crowd(engine, 3, first=9)
        drain(engine)
    data = recorder.to_json()
    check_recording(data)
    assert data["start"]["tables"] and data["start"]["cached"]
    begun = {request["id"]: request["begun"][0] for request in data["requests"] if "begun" in request}
    words = {"RUNNING": "running", "PREEMPTED": "preempted"}
    assert begun == {i: words[name] for i, name in status.items() if name in words} and len(set(begun.values())) == 2
    check_against_trace(data, list(engine.trace)[first:])


def test_a_trace_may_have_lost_its_first_steps() -> None:
    engine = engine_like("m4", **SMALL)
    crowd(engine, 4)
    drain(engine)
    whole, steps = record(engine).to_json(), list(engine.trace)
    recorder = Recorder(engine)
    for step in steps[6:]:
        recorder.observe(step)
    data = recorder.to_json()
    check_recording(data)
    check_against_trace(data, steps[6:])
    late = [request for request in data["requests"] if request.get("begun")]
    assert late and all(request["prompt"] is None for request in late)
    for request in late:
        (same,) = [other for other in whole["requests"] if other["id"] == request["id"]]
        assert len(request["output"]) == len(same["output"])
        assert [data["texts"][i] for i in request["output"]] == [""] * request["begun"][2] + [
            whole["texts"][i] for i in same["output"][request["begun"][2] :]
        ]


def test_an_id_that_is_used_again_is_another_request() -> None:
    engine = engine_like("m3", **SMALL)
    with recording(engine) as recorder:
        for prompt in ([1, 2, 3], [4, 5]):
            engine.add_request("same", prompt, SamplingParams(max_tokens=3, ignore_eos=True))
            drain(engine)
    data = recorder.to_json()
    assert [request["id"] for request in data["requests"]] == ["same", "same"]
    texts = [["".join(data["texts"][i] for i in data["prompts"][r["prompt"]])] for r in data["requests"]]
    assert texts == [["1 2 3 "], ["4 5 "]]
    assert [len(request["output"]) for request in data["requests"]] == [3, 3]


def test_blocks_are_recorded_and_then_let_go() -> None:
    engine = paged_mock_engine()
    watched: list[StepTrace] = []
    engine.on_step = watched.append
    with recording(engine) as recorder:
        crowd(engine, 2)
        drain(engine)
    assert all("tables" in step["blocks"] for step in recorder.to_json()["steps"][:1])
    assert [step.blocks for step in engine.trace] == [None] * len(engine.trace)
    assert (
        len(watched) == len(engine.trace) and engine.on_step == watched.append and not engine.core.recorder.trace_blocks
    )


def test_recording_and_watching_go_together() -> None:
    engine = paged_mock_engine()
    crowd(engine, 2)
    with recording(engine) as recorder, watching(Console(quiet=True), engine):
        drain(engine)
    assert len(recorder.to_json()["steps"]) == len(engine.trace) > 0


def test_an_engine_without_a_trace_cannot_be_recorded() -> None:
    engine = paged_mock_engine()
    engine.config = replace(engine.config, max_trace_steps=0)
    with pytest.raises(ValueError, match="max_trace_steps=0"), recording(engine):
        pass


def test_without_times_a_run_gives_the_same_recording_again() -> None:
    def once() -> dict[str, Any]:
        engine = engine_like("m4", **SMALL)
        with recording(engine, times=False) as recorder:
            crowd(engine)
            drain(engine)
        return recorder.to_json()

    assert once() == once()


def test_times_are_microseconds_from_the_start_of_the_step() -> None:
    engine = engine_like("m2")
    recorder = Recorder(engine)
    engine.add_request("x", [1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
    drain(engine)
    for number, step in enumerate(engine.trace):
        spans = {name: (5.0 + number + i / 1000, 5.0 + number + (i + 0.5) / 1000) for i, name in enumerate(PHASES)}
        recorder.observe(replace(step, phases=spans))
    steps = recorder.to_json()["steps"]
    assert steps[0]["times"] == [0, 0, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500]
    assert steps[1]["times"][0] == 1_000_000


# --- texts --------------------------------------------------------------------------------------------------


def test_texts_of_tokens_join_to_the_text() -> None:
    tokenizer = load_tokenizer(resolve_model("folo-tiny"))
    assert tokenizer is not None
    text = "Blocks, 그리고 캐시: 🙂🙃 naïve\n<b>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and "" in texts  # a smiley takes several tokens
    special = int(tokenizer.eos_token_id)
    assert token_texts(tokenizer, [*ids, special])[-1] == tokenizer.convert_ids_to_tokens(special)
    assert token_texts(None, [3, 14]) == ["3 ", "14 "]


class Bytes:
    """A tokenizer whose tokens are pieces of UTF-8, whatever characters they cut."""

    pieces: ClassVar[dict[int, bytes]] = {1: b"a\xc3", 2: b"\xa9b", 3: b"<end>"}
    all_special_ids: ClassVar[list[int]] = [3]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Bytes that make no character become U+FFFD."""
        return b"".join(self.pieces[i] for i in token_ids if i != 3).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """The token's name."""
        return self.pieces[token_id].decode()


def test_characters_that_are_cut_are_shown_once_they_are_whole_or_not_at_all() -> None:
    tokenizer: Any = Bytes()
    assert token_texts(tokenizer, [1, 2, 3]) == ["", "aéb", "<end>"]
    assert token_texts(tokenizer, [1]) == ["a"]
    assert token_texts(tokenizer, [1, 3, 1, 2]) == ["", "a<end>", "", "aéb"]


def test_the_page_has_the_texts_that_the_user_got() -> None:
    llm = LLM("folo-tiny", "m4", dtype="float32", device="cpu", trace_blocks=True, num_kv_blocks=32)
    outputs = llm.generate(["A block table", "한글 🙂"], SamplingParams(max_tokens=8), use_tqdm=False)
    data = record(llm.engine).to_json()
    for request, output in zip(data["requests"], outputs, strict=True):
        said = "".join(data["texts"][i] for i in request["output"])
        assert said.replace("\ufffd", "").startswith(output.outputs[0].text.replace("\ufffd", ""))
        assert "".join(data["texts"][i] for i in data["prompts"][request["prompt"]]).endswith(str(output.prompt))
