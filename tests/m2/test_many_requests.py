"""The text side with thousands of requests, and with several callers: who is handed what, and what a step looks at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from folovllm import LLM, LLMEngine, SamplingParams
from tests.mock import check_empty, mock_engine, mock_tokens

COUNT = 3000
WISHES = SamplingParams(max_tokens=2, ignore_eos=True)


class CountingDict(dict[str, Any]):
    """Counts the entries that somebody goes through; to look one up is free."""

    seen = 0

    def _count(self, entries: Any) -> Iterator[Any]:
        for entry in entries:
            CountingDict.seen += 1
            yield entry

    def __iter__(self) -> Iterator[str]:
        return self._count(super().__iter__())

    def keys(self) -> Any:
        return list(self)

    def items(self) -> Any:
        return list(self._count(super().items()))

    def values(self) -> Any:
        return list(self._count(super().values()))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> LLM:
    """An engine over the mock model that counts, in `CountingDict.seen`, each look at a request that lives."""
    llm = LLM.__new__(LLM)
    llm.engine = mock_engine(max_num_seqs=16, capacity=64 * 17)
    llm.engine._parent_requests, llm.engine._request_states = CountingDict(), CountingDict()
    is_live = LLMEngine.is_live

    def counting(self: LLMEngine, request_id: str) -> bool:
        CountingDict.seen += 1
        return is_live(self, request_id)

    monkeypatch.setattr(LLMEngine, "is_live", counting)
    monkeypatch.setattr(CountingDict, "seen", 0)
    return llm


def prompt(i: int) -> list[int]:
    return [i % 64, i // 64]


def check(token_ids: list[int], i: int) -> None:
    assert token_ids == mock_tokens(prompt(i), WISHES)[0]


def test_to_add_requests_one_by_one_looks_at_each_a_few_times(counted: LLM) -> None:
    engine = counted.engine
    for i in range(COUNT):
        engine.add_request(engine.next_request_id(), prompt(i), WISHES)
    assert CountingDict.seen <= 4 * COUNT
    assert len(engine._parent_requests) == engine.core.scheduler.num_waiting == COUNT
    engine.abort_request([str(i) for i in range(COUNT)])
    check_empty(engine)


def test_a_batch_of_thousands_looks_at_each_a_few_times(counted: LLM) -> None:
    outputs = counted.engine.generate_batch([prompt(i) for i in range(COUNT)], WISHES)
    assert CountingDict.seen <= 6 * COUNT
    assert list(outputs) == [str(i) for i in range(COUNT)]
    for i, output in enumerate(outputs.values()):
        check(output.outputs[0].token_ids, i)
    assert counted.engine.stats.max_running == 16 and counted.engine.stats.steps >= 2 * COUNT / 16
    check_empty(counted.engine)


def test_a_stream_of_thousands_looks_at_each_a_few_times(counted: LLM) -> None:
    done = 0
    for output in counted.stream([prompt(i) for i in range(COUNT)], WISHES):
        if output.finished:
            check(output.outputs[0].token_ids, int(output.request_id))
            done += 1
    assert done == COUNT and CountingDict.seen <= 6 * COUNT
    check_empty(counted.engine)


# ---------------------------------------------------------------------- who is handed what


def mock_llm(max_num_seqs: int = 2) -> LLM:
    llm = LLM.__new__(LLM)
    llm.engine = mock_engine(max_num_seqs=max_num_seqs, capacity=64 * (max_num_seqs + 1))
    return llm


def test_ids_that_are_taken_are_passed_over_and_none_is_given_twice() -> None:
    engine = mock_llm().engine
    engine.add_request("0", prompt(0), WISHES)
    engine.add_request("2/7", prompt(1), WISHES)  # as if it were a sample of "2"
    assert [engine.next_request_id() for _ in range(3)] == ["1", "3", "4"]
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.next_request_id() == "5"
    check_empty(engine)


def test_a_complete_request_that_nobody_has_taken_is_in_nobodys_way() -> None:
    llm = mock_llm()
    llm.engine.add_request("0/1", prompt(0), SamplingParams(max_tokens=1, ignore_eos=True))
    assert llm.engine.step_for(set(), final_only=True) == []  # complete, and kept for whoever asks
    (output,) = llm.generate([prompt(2)], SamplingParams(n=2, seed=1, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert output.request_id == "0" and output.finished and len(output.outputs) == 2
    (waiting,) = llm.engine.step()
    assert waiting.request_id == "0/1" and waiting.finished
    check_empty(llm.engine)


def test_an_id_that_comes_twice_in_one_call_is_refused_and_nothing_is_queued() -> None:
    engine = mock_llm().engine
    samples = SamplingParams(n=2, seed=1, max_tokens=2, ignore_eos=True)
    for first, second in (("a", "a"), ("a", "a/1"), ("a/0", "a")):
        calls = [engine.prepare(first, prompt(0), samples), engine.prepare(second, prompt(1), samples)]
        with pytest.raises(ValueError, match=f"request_id='{second}' is in use"):
            engine.submit(calls)
    check_empty(engine)


def test_an_id_that_is_named_twice_is_aborted_once() -> None:
    engine = mock_llm().engine
    engine.add_request("a", prompt(0), WISHES)
    engine.add_request("done", prompt(1), SamplingParams(max_tokens=1, ignore_eos=True))
    engine.generate_batch([], WISHES)
    engine.step_for(set(), final_only=True)  # somebody else's step completes "done"
    outputs = engine.abort_request(["a", "done", "a", "unknown", "done"])
    assert sorted(output.request_id for output in outputs) == ["a", "done"]
    check_empty(engine)


def test_a_step_for_some_hands_over_what_is_ready_first() -> None:
    engine = mock_llm(4).engine
    for name in ("a", "b", "c"):
        engine.add_request(name, prompt(ord(name)), SamplingParams(max_tokens=1, ignore_eos=True))
    engine.add_request("d", prompt(0), WISHES)
    assert engine.step_for({"d"}, final_only=True) == []
    steps = engine.stats.steps
    assert [o.request_id for o in engine.step_for({"c", "d", "a"}, final_only=True)] == ["a", "c"]
    assert engine.stats.steps == steps  # without a step
    assert [o.request_id for o in engine.step_for({"d"}, final_only=True)] == ["d"]
    assert [o.request_id for o in engine.step()] == ["b"]
    check_empty(engine)


@pytest.mark.timeout(20)
def test_a_run_waits_for_its_own_requests_and_not_for_a_namesake() -> None:
    """When "a" is done, somebody else uses its id again: the run is over, and the other "a" goes on untouched."""
    engine = mock_llm().engine
    engine.add_request("a", prompt(0), WISHES)
    engine.add_request("b", prompt(1), SamplingParams(max_tokens=4, ignore_eos=True))
    longer = SamplingParams(max_tokens=9, ignore_eos=True)

    def add_again(output: Any) -> None:
        if output.request_id == "a":
            engine.add_request("a", prompt(2), longer)

    done = engine.run_to_completion(["a", "b"], on_done=add_again)
    assert {i: len(o.outputs[0].token_ids) for i, o in done.items()} == {"a": 2, "b": 4}
    check(done["a"].outputs[0].token_ids, 0)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == mock_tokens(prompt(2), longer)[0]
    check_empty(engine)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_run_goes_on_when_one_of_its_requests_is_aborted_by_another(victim: int) -> None:
    llm = mock_llm(3)
    ids = llm.enqueue([prompt(i) for i in range(4)], SamplingParams(max_tokens=5, ignore_eos=True))
    seen = []
    for output in llm.follow(ids):
        seen.append(output)
        if len(seen) == 4:
            llm.engine.abort_request(ids[victim])
    assert {o.request_id for o in seen if o.finished} == set(ids) - {ids[victim]}
    check_empty(llm.engine)
