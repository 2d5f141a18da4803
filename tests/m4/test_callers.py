"""Several threads, one LLM: each call has its own answers, and one loop runs the steps for all of them.

The right answer is Hugging Face's for the prompt alone. Threads meet at barriers, never after a wait of some length.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from folovllm import LLM, BeamSearchParams, EngineGenerateError, InvalidRequestError, RequestOutput, SamplingParams
from folovllm.engine.trace import StepTrace
from tests.m2.test_many_requests import mock_llm
from tests.mock import check_empty, mock_tokens
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

MILESTONES = ("m1", "m2", "m3", "m4")
TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS)
LONG = SamplingParams(temperature=0, max_tokens=40)
MOCK = SamplingParams(max_tokens=6, ignore_eos=True)
pytestmark = pytest.mark.timeout(40)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def folder(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    reference.save_pretrained(path)
    return str(path)


def make(folder: str, milestone: str, **options: Any) -> LLM:
    return LLM(folder, milestone=milestone, dtype="float32", device="cpu", num_kv_blocks=200, **options)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return or raise, each in a thread of its own, begun together."""
    barrier = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        barrier.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a call never returned"
    for result in results:
        if isinstance(result, AssertionError):
            raise result
    return results


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def check_left(llm: LLM) -> None:
    engine = llm.engine
    assert not engine.has_unfinished_requests() and not engine._outbox.grown and not engine._outbox.failures
    assert engine.core.scheduler.requests == {} and engine.core.scheduler.kv.usage().reserved == 0
    assert engine.loop._followers == {} and engine.loop._arrivals == set() and not engine._callers


@pytest.mark.parametrize("milestone", MILESTONES)
def test_each_call_has_its_own_answers(
    milestone: str, folder: str, reference: PreTrainedModel, oracle_stats: OracleStats
) -> None:
    """Four threads, three calls each: one prompt, several, a stream; of different lengths, in an order of their own."""
    llm = make(folder, milestone)
    prompts = [random_prompt(3 + 5 * i, seed=i) for i in range(6)]
    want = [hf_greedy(reference, prompt, TOKENS) for prompt in prompts]

    def work(seed: int) -> list[tuple[int, list[int]]]:
        order, got = random.Random(seed).sample(range(6), 6), []
        got.append((order[0], tokens(llm.generate(prompts[order[0]], GREEDY, use_tqdm=False)[0])))
        several = llm.generate([prompts[i] for i in order[1:4]], GREEDY, use_tqdm=False)
        got += list(zip(order[1:4], map(tokens, several), strict=True))
        last: dict[str, RequestOutput] = {}
        for output in llm.stream([prompts[i] for i in order[4:]], GREEDY):
            assert len(tokens(output)) > len(tokens(last[output.request_id])) if output.request_id in last else True
            last[output.request_id] = output
        assert all(output.finished for output in last.values())
        got += list(zip(order[4:], [tokens(last[i]) for i in sorted(last, key=int)], strict=True))
        return got

    for got in at_once(*(lambda seed=seed: work(seed) for seed in range(4))):
        assert isinstance(got, list), got
        for i, ids in got:
            assert_same_tokens(ids, want[i], reference, prompts[i], oracle_stats)
    check_left(llm)


@pytest.mark.parametrize("milestone", MILESTONES)
def test_generate_stream_beams_samples_and_resets_at_the_same_time(
    milestone: str, folder: str, reference: PreTrainedModel, oracle_stats: OracleStats
) -> None:
    llm = make(folder, milestone)
    prompts = [random_prompt(20, seed=i) for i in range(4)]
    want = [hf_greedy(reference, prompt, TOKENS) for prompt in prompts]
    beams = BeamSearchParams(beam_width=2, max_tokens=4)
    seeded = SamplingParams(n=2 if milestone != "m1" else 1, seed=7, max_tokens=TOKENS)
    alone = make(folder, milestone)
    want_beams = [s.tokens for s in alone.beam_search([prompts[2]], beams)[0].sequences]
    want_samples = [c.token_ids for c in alone.generate([prompts[3]], seeded, use_tqdm=False)[0].outputs]
    with torch.no_grad():
        searched = reference.generate(
            torch.tensor([prompts[2]]),
            num_beams=2,
            num_return_sequences=2,
            max_new_tokens=4,
            do_sample=False,
            early_stopping=False,
            pad_token_id=0,
        )
    assert want_beams == searched.tolist()

    generated, streamed, found, samples, _ = at_once(
        lambda: [tokens(o) for o in llm.generate(prompts[:2], GREEDY, use_tqdm=False)],
        lambda: tokens(list(llm.stream(prompts[1], GREEDY))[-1]),
        lambda: [s.tokens for s in llm.beam_search([prompts[2]], beams)[0].sequences],
        lambda: [c.token_ids for c in llm.generate([prompts[3]], seeded, use_tqdm=False)[0].outputs],
        lambda: [llm.reset_prefix_cache() for _ in range(50)],
    )
    for ids, i in [*zip(generated, range(2), strict=True), (streamed, 1)]:
        assert_same_tokens(ids, want[i], reference, prompts[i], oracle_stats)
    assert (found, samples) == (want_beams, want_samples)
    check_left(llm)


@pytest.mark.parametrize("milestone", MILESTONES[1:])
def test_requests_of_two_callers_share_steps(milestone: str, folder: str) -> None:
    """B's request joins in the middle of A's, though A never waits: who brings requests goes before the next step."""
    llm = make(folder, milestone)
    started = threading.Event()
    llm.engine.on_step = lambda step: started.set()
    mine, other = at_once(
        lambda: llm.generate(random_prompt(5), LONG, use_tqdm=False),
        lambda: started.wait(30) and llm.generate(random_prompt(9, seed=1), GREEDY, use_tqdm=False),
    )
    ids = {mine[0].request_id, other[0].request_id}
    assert any({request.request_id for request in step.requests} == ids for step in llm.engine.trace)
    assert llm.engine.stats.steps < len(tokens(mine[0])) + len(tokens(other[0]))


@pytest.mark.parametrize("where", ["closed", "dropped", "never read", "in a cycle"])
def test_an_abandoned_stream_is_aborted_while_others_go_on(where: str) -> None:
    llm = mock_llm(4)
    params = SamplingParams(max_tokens=40, ignore_eos=True)

    def abandon() -> None:
        stream = llm.stream([[1], [2]], params)
        if where != "never read":
            next(stream)
        if where == "closed":
            stream.close()
        if where == "in a cycle":
            stream.self = stream  # type: ignore[attr-defined]
            del stream
            gc.collect()

    results = at_once(
        *[abandon] * 4, lambda: [tokens(o) for o in llm.generate([[3], [4], [5]], params, use_tqdm=False)]
    )
    assert results[:4] == [None] * 4
    assert results[4] == [mock_tokens([i], params)[0] for i in (3, 4, 5)]
    gc.collect()
    check_empty(llm.engine)


def test_a_stream_that_is_collected_in_the_middle_of_a_step_waits_for_its_end() -> None:
    """A finalizer may run anywhere, in the thread that steps, too."""
    llm = mock_llm(4)
    streams = [llm.stream([[1]], MOCK)]
    runner = llm.engine.core.runner
    execute = runner.execute_model

    def collecting(step: Any) -> Any:
        streams.clear()
        assert "0" in llm.engine.core.scheduler.requests  # not now
        runner.execute_model = execute  # type: ignore[method-assign]
        return execute(step)

    runner.execute_model = collecting  # type: ignore[method-assign]
    assert [tokens(o) for o in llm.generate([[2]], MOCK, use_tqdm=False)] == [mock_tokens([2], MOCK)[0]]
    check_empty(llm.engine)


def test_who_reads_a_stream_slowly_holds_up_nobody_and_misses_nothing() -> None:
    llm = mock_llm(4)
    stream = llm.stream([[1]], MOCK)
    first = next(stream)
    (done,) = at_once(lambda: llm.generate([[2]], MOCK, use_tqdm=False))  # its steps complete the stream's request, too
    assert tokens(done[0]) == mock_tokens([2], MOCK)[0]
    rest = list(stream)
    assert len(tokens(first)) == 1 and rest[-1].finished and tokens(rest[-1]) == mock_tokens([1], MOCK)[0]
    check_empty(llm.engine)


def test_a_callback_that_raises_or_waits_for_another_call_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is shown in the caller's own time: no lock is held."""
    llm = mock_llm(4)
    reached, released = threading.Event(), threading.Event()

    def waits(output: RequestOutput) -> None:
        reached.set()
        assert released.wait(30)

    def raises(output: RequestOutput) -> None:
        raise KeyError("mine")

    engine = llm.engine
    short = SamplingParams(max_tokens=1, ignore_eos=True)

    def meanwhile() -> list[int]:
        assert reached.wait(30)
        answer = tokens(llm.generate([[5]], MOCK, use_tqdm=False)[0])
        released.set()
        return answer

    waiting, failing, other = at_once(
        lambda: engine.run_to_completion(engine.enqueue([[1], [2]], [short, MOCK]), waits),
        lambda: engine.run_to_completion(engine.enqueue([[3], [4]], [short, MOCK]), raises),
        meanwhile,
    )
    assert [tokens(o) for o in waiting.values()] == [mock_tokens([1], short)[0], mock_tokens([2], MOCK)[0]]
    assert isinstance(failing, KeyError) and other == mock_tokens([5], MOCK)[0]
    check_empty(engine)


def test_a_step_that_fails_is_the_fault_of_those_whose_requests_it_ends() -> None:
    """One at a time: the step of the poisoned request has no other, and in whatever thread, its caller hears of it."""
    llm = mock_llm(1)
    runner = llm.engine.core.runner
    execute = runner.execute_model

    def poisoned(step: Any) -> Any:
        if any(13 in share.token_ids and share.start == 0 for share in step.scheduled):
            raise RuntimeError("poison")
        return execute(step)

    runner.execute_model = poisoned  # type: ignore[method-assign]

    def ask(token: int) -> tuple[list[int], Any, Any]:
        completion = llm.generate([[token, 1]], MOCK, use_tqdm=False)[0].outputs[0]
        return completion.token_ids, completion.finish_reason, completion.stop_reason

    prompts = [1, 2, 13, 3, 13, 4]
    results = at_once(*(lambda token=token: ask(token) for token in prompts))
    for token, result in zip(prompts, results, strict=True):
        if token == 13:
            assert result == ([], "error", "RuntimeError: poison")
        else:
            assert result == (mock_tokens([token, 1], MOCK)[0], "length", None)
    check_empty(llm.engine)


def test_refused_calls_and_aborts_concern_their_callers_only() -> None:
    llm = mock_llm(4)

    def refused() -> None:
        for _ in range(20):
            with pytest.raises(InvalidRequestError, match=r"prompt_token_ids\[0\]=99"):
                llm.generate([[1], [99]], MOCK, use_tqdm=False)

    def aborted() -> int:
        count = 0
        for _ in range(20):
            request_ids = llm.enqueue([[1], [2]], MOCK)
            count += len(llm.engine.abort_request(request_ids))
        return count

    def ask(token: int) -> list[list[int]]:
        return [tokens(llm.generate([[token]], MOCK, use_tqdm=False)[0]) for _ in range(10)]

    results = at_once(refused, aborted, lambda: ask(7), lambda: ask(8))
    assert results[:2] == [None, 40]
    assert results[2:] == [[mock_tokens([token], MOCK)[0]] * 10 for token in (7, 8)]
    check_empty(llm.engine)


def test_a_call_whose_requests_another_thread_aborts_returns_without_them() -> None:
    llm = mock_llm(4)
    long = SamplingParams(max_tokens=50, ignore_eos=True)
    request_ids = llm.enqueue([[1], [2]], long)
    seen = threading.Event()
    llm.engine.on_step = lambda step: seen.set()

    def abort() -> int:
        assert seen.wait(30)
        return len(llm.engine.abort_request(request_ids[:1]))

    done, count = at_once(lambda: llm.engine.run_to_completion(request_ids), abort)
    assert count + len(done) == 2 and tokens(done[request_ids[1]]) == mock_tokens([2], long)[0]
    check_empty(llm.engine)


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize("milestone", MILESTONES)
def test_ctrl_c_ends_the_call_of_the_main_thread_and_no_other(
    milestone: str, leads: bool, folder: str, reference: PreTrainedModel, oracle_stats: OracleStats
) -> None:
    """A real signal, in a step that the main thread runs, or while it follows another thread's step."""
    llm = make(folder, milestone)
    main = threading.main_thread()
    if threading.current_thread() is not main:
        pytest.skip("the tests do not run in the main thread")
    prompt = random_prompt(6, seed=3)
    runner = llm.engine.core.runner
    execute, fired = runner.execute_model, []

    def interrupting(step: Any) -> Any:
        both = len(llm.engine._callers) == 2 and llm.engine.stats.steps > 3
        if both and not fired and (threading.current_thread() is main) == leads:
            fired.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return execute(step)

    runner.execute_model = interrupting  # type: ignore[method-assign]
    got: list[list[int]] = []
    stop = threading.Event()

    def other() -> None:
        while not stop.is_set():
            got.append(tokens(llm.generate(prompt, LONG, use_tqdm=False)[0]))

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate(random_prompt(4), LONG, use_tqdm=False)
    finally:
        stop.set()
        thread.join(60)
    assert fired and got and not thread.is_alive()
    want = hf_greedy(reference, prompt, 40)
    for ids in got:
        assert_same_tokens(ids, want, reference, prompt, oracle_stats)
    check_left(llm)


def test_a_second_ctrl_c_does_not_wait_for_the_step() -> None:
    llm = mock_llm(4)
    at_once(lambda: llm.enqueue([[1]], MOCK))  # another thread's, so that the first one waits
    runner = llm.engine.core.runner
    execute, reached = runner.execute_model, []

    def stuck(step: Any) -> Any:
        runner.execute_model = execute  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(2)

    runner.execute_model = stuck  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[2]], MOCK, use_tqdm=False)
    assert reached == [1]
    with pytest.raises(EngineGenerateError, match="request '0' was in a step that another thread ran"):
        list(llm.follow(["0"]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_empty(llm.engine)


def test_one_thread_has_the_steps_it_had_and_no_other_thread_is_made() -> None:
    llm = mock_llm(2)
    seen: list[tuple[int, int]] = []
    llm.engine.on_step = lambda step: seen.append((step.step, threading.get_ident()))
    before = threading.active_count()
    llm.generate([[1], [2], [3]], MOCK, use_tqdm=False)
    assert seen == [(i, threading.get_ident()) for i in range(12)]  # two at a time, six tokens each, then the third
    assert threading.active_count() == before


def test_an_observer_may_call_the_engine() -> None:
    llm = mock_llm(4)
    inner: list[list[int]] = []

    def ask(step: StepTrace) -> None:
        if not inner:
            inner.append([])
            inner[0] = tokens(llm.generate([[9]], MOCK, use_tqdm=False)[0])

    llm.engine.on_step = ask
    results = at_once(*(lambda i=i: tokens(llm.generate([[i]], MOCK, use_tqdm=False)[0]) for i in range(3)))
    assert [*results, inner[0]] == [mock_tokens([i], MOCK)[0] for i in (0, 1, 2, 9)]
    check_empty(llm.engine)


def use_in_threads(llm: LLM) -> None:
    at_once(*(lambda i=i: llm.generate(random_prompt(4, seed=i), GREEDY, use_tqdm=False) for i in range(2)))


def test_an_llm_is_freed_with_its_last_name(folder: str) -> None:
    """No thread and no cycle of the loop's keeps it."""
    llm = make(folder, "m4")
    use_in_threads(llm)
    engine, before = weakref.ref(llm.engine), threading.active_count()
    del llm
    gc.collect()
    assert engine() is None and threading.active_count() == before


def test_many_calls_of_many_threads(folder: str, reference: PreTrainedModel, tmp_path: Path) -> None:
    """Sixteen threads in a small pool, so that requests wait and are preempted; seeds give what they give alone."""
    params = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=1.0, seed=11, max_tokens=12),
        SamplingParams(temperature=0.7, top_k=20, seed=5, max_tokens=9),
    ]
    prompts = [random_prompt(2 + 3 * i, seed=i) for i in range(5)]
    alone = make(folder, "m4")
    want = {
        (i, j): tokens(alone.generate(prompts[i], params[j], use_tqdm=False)[0]) for i in range(5) for j in range(3)
    }
    llm = LLM(folder, dtype="float32", device="cpu", block_size=4, num_kv_blocks=24, max_num_batched_tokens=16)

    def work(seed: int) -> list[tuple[tuple[int, int], list[int]]]:
        rng = random.Random(seed)
        keys = [(rng.randrange(5), rng.randrange(3)) for _ in range(4)]
        return [(k, tokens(llm.generate(prompts[k[0]], params[k[1]], use_tqdm=False)[0])) for k in keys]

    for got in at_once(*(lambda seed=seed: work(seed) for seed in range(16))):
        assert isinstance(got, list), got
        assert all(ids == want[key] for key, ids in got)
    check_left(llm)
