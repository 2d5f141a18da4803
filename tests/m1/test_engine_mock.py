"""The engine loop over the mock model: life cycle, stop rules, forks, aborts, books that balance."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm import LLM, SamplingParams
from folovllm.messages import ModelRunnerOutput
from folovllm.request import Request, RequestStatus
from tests.mock import EOS, VOCAB_SIZE, MockRunner, check_empty, drain, first_scheduled, mock_engine, mock_tokens

prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    seed=st.integers(0, 3),
    max_tokens=st.integers(6, 20),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, params), min_size=1, max_size=6),
    max_num_seqs=st.integers(1, 3),
    capacity=st.integers(64, 256),
    budget=st.integers(20, 40),
)
def test_every_token_and_reason_is_right_and_nothing_stays_behind(work, max_num_seqs, capacity, budget):
    engine = mock_engine(max_num_seqs, budget, capacity=capacity)
    for i, (prompt, wishes) in enumerate(work):
        engine.add_request(str(i), prompt, wishes)
    done = drain(engine)
    assert list(done) == [str(i) for i in range(len(work))] or max_num_seqs > 1
    for i, (prompt, wishes) in enumerate(work):
        expected = [mock_tokens(prompt, wishes.child(k)) for k in range(wishes.n)]
        assert done[str(i)] == ([tokens for tokens, _ in expected], [reason for _, reason in expected])
    check_empty(engine)
    for step in engine.trace:
        assert step.num_scheduled_tokens <= budget and len(step.requests) <= max_num_seqs
        assert step.kv.used <= step.kv.reserved <= step.kv.capacity


@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, params), min_size=1, max_size=5),
    max_num_seqs=st.integers(1, 3),
    capacity=st.integers(64, 192),
    data=st.data(),
)
def test_abort_and_arrival_at_any_step_leave_others_untouched(work, max_num_seqs, capacity, data):
    engine = mock_engine(max_num_seqs, capacity=capacity)
    waiting = list(enumerate(work))
    aborted: set[str] = set()  # whole requests
    cut: set[str] = set()  # single sequences
    done: dict[str, list[list[int]]] = {}
    while waiting or engine.has_unfinished_requests():
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "abort", "abort one sequence"]))
        if action == "add" and waiting:
            i, (prompt, wishes) = waiting.pop(0)
            engine.add_request(str(i), prompt, wishes)
        elif action == "abort" and engine._parent_requests:
            victim = data.draw(st.sampled_from(sorted(engine._parent_requests)))
            outputs = engine.abort_request(victim)
            assert [o.request_id for o in outputs] == [victim] and outputs[0].finished
            for k, c in enumerate(outputs[0].outputs):
                whole, reason = mock_tokens(*_child(work, victim, k))
                assert c.token_ids == whole[: len(c.token_ids)]
                assert c.finish_reason == (reason if c.token_ids == whole else "abort")
            aborted.add(victim)
        elif action == "abort one sequence" and engine._request_states:
            # As a stop string does: one of n sequences ends, its siblings go on.
            victim = data.draw(st.sampled_from(sorted(engine._request_states)))
            user, sequence = engine._request_states[victim]
            engine.core.abort_requests([victim])
            sequence.abort()
            for output in engine._outputs([user], growing=()):
                done[output.request_id] = [c.token_ids for c in output.outputs]
            cut.add(victim)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = [c.token_ids for c in output.outputs]
    for i, (prompt, wishes) in enumerate(work):
        ids = [str(i)] if wishes.n == 1 else [f"{i}/{k}" for k in range(wishes.n)]
        if str(i) not in aborted:
            for k, sequence_id in enumerate(ids):
                whole = mock_tokens(prompt, wishes.child(k))[0]
                assert done[str(i)][k] == (whole[: len(done[str(i)][k])] if sequence_id in cut else whole)
    check_empty(engine)


def _child(work, request_id, k):
    prompt, wishes = work[int(request_id)]
    return prompt, wishes.child(k)


def test_first_decode_token_runs_at_the_position_of_the_prompts_length():
    engine = mock_engine()
    engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    drain(engine)
    shares = [step.scheduled[0] for step in engine.core.runner.steps if step.scheduled]
    assert [(s.start, s.num_tokens) for s in shares] == [(0, 3), (3, 1), (4, 1)]


def test_each_sample_computes_the_prompt():
    """Contiguous K/V cannot be shared. M3 is where the samples of a prompt share its blocks."""
    engine = mock_engine(capacity=128)
    prompt = list(range(1, 11))
    wishes = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
    engine.add_request("a", prompt, wishes)
    engine.add_request("late", [3], SamplingParams(max_tokens=2, ignore_eos=True))
    done = drain(engine)
    assert done["a"][0] == [mock_tokens(prompt, wishes.child(k))[0] for k in range(3)]
    assert engine.stats.prompt_tokens_computed == 3 * 10 + 1
    assert first_scheduled(engine) == ["a/0", "a/1", "a/2", "late"]
    check_empty(engine)


def test_a_step_never_takes_more_than_the_budget():
    engine = mock_engine(max_num_seqs=3, budget=20, capacity=256)
    for i in range(3):
        engine.add_request(str(i), [i + 1] * 12, SamplingParams(max_tokens=3, ignore_eos=True))
    drain(engine)
    # One prompt a step, because two do not fit; decodes go along with the next prompt.
    assert [s.num_scheduled_tokens for s in engine.trace] == [12, 13, 14, 2, 1]


def test_tokens_sampled_after_the_one_that_stops_are_dropped():
    """A step may bring several tokens; what comes after EOS never existed."""
    engine = mock_engine()
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=9))
    step = engine.core.scheduler.schedule()
    result = ModelRunnerOutput(sampled_token_ids=[[7, EOS, 8]], logprobs=[None])
    (output,) = engine.core.scheduler.update_from_output(step, result)
    assert output.new_token_ids == [7, EOS] and output.finish_reason == "stop"


def test_requests_are_served_first_come_first_served():
    engine = mock_engine()
    for i in range(5):
        engine.add_request(f"r{i}", [i + 1], SamplingParams(max_tokens=3, ignore_eos=True))
    order = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id not in order:
                order.append(output.request_id)
    assert order == [f"r{i}" for i in range(5)]


def test_max_tokens_gives_length_and_eos_gives_stop():
    engine = mock_engine()
    prompt = next(
        p for p in ([a, b] for a in range(64) for b in range(64)) if mock_tokens(p, SamplingParams())[1] == "stop"
    )
    engine.add_request("eos", prompt, SamplingParams())
    engine.add_request("length", prompt, SamplingParams(max_tokens=1))
    engine.add_request("ignored", prompt, SamplingParams(ignore_eos=True, max_tokens=20))
    done = drain(engine)
    assert done["eos"][1] == ["stop"] and done["eos"][0][0][-1] == EOS
    assert done["length"] == ([mock_tokens(prompt, SamplingParams(max_tokens=1))[0]], ["length"])
    assert done["ignored"][1] == ["length"] and len(done["ignored"][0][0]) == 20


def test_stop_reason_names_the_stop_token_and_is_none_for_eos():
    engine = mock_engine()
    prompt = [7, 9]
    tokens, _ = mock_tokens(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    outputs = engine.generate_batch([prompt], SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[tokens[3]]))
    completion = outputs["0"].outputs[0]
    assert completion.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", tokens[3])


def test_a_model_length_reached_is_a_length_finish():
    engine = mock_engine(max_model_len=16)
    wishes = SamplingParams(max_tokens=None, ignore_eos=True)
    done = engine.generate_batch([[1] * 10, [2] * 15], wishes)
    assert [len(o.outputs[0].token_ids) for o in done.values()] == [6, 1]
    assert {o.outputs[0].finish_reason for o in done.values()} == {"length"}


def test_what_completes_beside_a_batch_call_is_handed_over_later():
    engine = mock_engine()
    engine.add_request("mine", [3], SamplingParams(max_tokens=2, ignore_eos=True))
    done = engine.generate_batch([[4], [5]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert list(done) == ["0", "1"]
    assert engine.has_unfinished_requests()
    (output,) = engine.step()
    assert output.request_id == "mine" and output.finished
    assert not engine.has_unfinished_requests()


def test_an_interrupted_batch_leaves_nothing_behind_and_the_engine_goes_on():
    engine = mock_engine()
    runner = engine.core.runner
    execute, calls = runner.execute_model, []

    def interrupted(step):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return execute(step)

    runner.execute_model = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch([[1, 2], [3, 4]], SamplingParams(max_tokens=5, ignore_eos=True))
    check_empty(engine)
    done = engine.generate_batch([[1, 2]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert (
        next(iter(done.values())).outputs[0].token_ids
        == mock_tokens([1, 2], SamplingParams(max_tokens=5, ignore_eos=True))[0]
    )


def test_an_interrupted_step_ends_its_own_requests_and_no_others():
    """After an interrupt of the forward the K/V of the step is in doubt: never go on with it as if nothing had been."""
    engine = mock_engine(max_num_seqs=2, capacity=256)
    runner, wishes = engine.core.runner, SamplingParams(max_tokens=5, ignore_eos=True)
    assert isinstance(runner, MockRunner)
    for i in range(3):
        engine.add_request(str(i), [i + 1, 7], wishes)
    engine.step()
    execute = runner.execute_model

    def half_done(step):
        execute(step)  # K/V is written, and then something breaks
        raise KeyboardInterrupt

    runner.execute_model = half_done  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    runner.execute_model = execute  # type: ignore[method-assign]
    done = drain(engine)
    assert {i: reasons for i, (_, reasons) in done.items()} == {"0": ["abort"], "1": ["abort"], "2": ["length"]}
    assert done["0"][0] == [mock_tokens([1, 7], wishes)[0][:1]]
    assert done["2"][0] == [mock_tokens([3, 7], wishes)[0]]
    check_empty(engine)


def test_a_request_without_a_token_to_choose_ends_alone_and_says_why():
    engine = mock_engine(max_num_seqs=2, capacity=256)
    runner, wishes = engine.core.runner, SamplingParams(max_tokens=5, ignore_eos=True)
    assert isinstance(runner, MockRunner)
    for i in range(3):
        engine.add_request(str(i), [i + 1, 7], wishes)
    engine.step()
    runner.failing = {"0"}
    outputs = {o.request_id: o.outputs[0] for o in engine.step()}
    assert (outputs["0"].finish_reason, outputs["0"].stop_reason) == ("error", "no token to choose")
    assert outputs["0"].token_ids == mock_tokens([1, 7], wishes)[0][:1]
    done = drain(engine)
    assert {i: t for i, (t, _) in done.items()} == {
        "1": [mock_tokens([2, 7], wishes)[0]],
        "2": [mock_tokens([3, 7], wishes)[0]],
    }
    check_empty(engine)


def test_a_failure_before_the_runner_has_listened_is_made_up_for():
    """What finished before the failed step must be told to the runner again, or it would keep its K/V for good."""
    engine = mock_engine()
    runner, wishes = engine.core.runner, SamplingParams(max_tokens=2, ignore_eos=True)
    assert isinstance(runner, MockRunner)
    for i in range(3):
        engine.add_request(str(i), [i + 1], wishes)
    engine.step()
    engine.step()  # request 0 is complete, and the runner does not know it yet
    update = runner.update_states

    def deaf(step):
        raise MemoryError

    runner.update_states = deaf  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        engine.step()
    runner.update_states = update  # type: ignore[method-assign]
    drain(engine)
    check_empty(engine)


# ---------------------------------------------------------------------- several callers, one engine


def mock_llm() -> LLM:
    llm = LLM.__new__(LLM)
    llm.engine = mock_engine(max_model_len=64)
    return llm


WISHES = SamplingParams(max_tokens=4, ignore_eos=True)
EXPECTED = {i: mock_tokens([i], WISHES)[0] for i in range(1, 8)}


def tokens(outputs) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs if o.finished]


@pytest.mark.timeout(20)
def test_two_streams_share_an_engine_in_any_order():
    llm = mock_llm()
    first, second = llm.stream([[1]], WISHES), llm.stream([[2]], WISHES)
    assert tokens(second) == [EXPECTED[2]] and tokens(first) == [EXPECTED[1]]
    pairs = list(zip_longest(llm.stream([[3]], WISHES), llm.stream([[4]], WISHES)))
    assert tokens(a for a, _ in pairs if a) == [EXPECTED[3]] and tokens(b for _, b in pairs if b) == [EXPECTED[4]]
    check_empty(llm.engine)


@pytest.mark.timeout(20)
def test_a_batch_call_inside_a_stream_loses_nothing():
    llm = mock_llm()
    streamed, inner = [], []
    for output in llm.stream([[1], [2]], WISHES):
        streamed.append(output)
        inner += llm.generate([[3]], WISHES, use_tqdm=False)
    assert tokens(streamed) == [EXPECTED[1], EXPECTED[2]]
    assert inner and all(t == EXPECTED[3] for t in tokens(inner))
    check_empty(llm.engine)


@pytest.mark.timeout(20)
def test_requests_that_another_call_completed_are_handed_over():
    llm = mock_llm()
    ids = llm.enqueue([[1]], WISHES)
    llm.generate([[2]], WISHES, use_tqdm=False)
    done = llm.engine.run_to_completion(ids)
    assert tokens(done.values()) == [EXPECTED[1]]
    with pytest.raises(ValueError, match="are unknown"):
        llm.engine.run_to_completion(ids)
    with pytest.raises(ValueError, match=r"request_ids=\['nope'\] are unknown"):
        llm.follow(["nope"])
    check_empty(llm.engine)


@pytest.mark.timeout(20)
def test_requests_aborted_or_taken_by_somebody_else_are_not_waited_for():
    llm = mock_llm()
    for output in llm.stream([[1]], WISHES):
        llm.engine.abort_request(output.request_id)
    for _ in llm.stream([[1]], WISHES):
        llm.engine.step()
    ids = llm.enqueue([[1], [2]], WISHES)
    done = llm.engine.run_to_completion(ids, on_done=lambda o: llm.engine.abort_request(ids))
    assert list(done) == ids[:1]
    check_empty(llm.engine)


def test_a_stream_dropped_before_it_began_leaves_nothing_behind():
    llm = mock_llm()
    stream = llm.stream([[1], [2]], WISHES)
    stream.close()
    assert list(stream) == [] and not llm.engine.has_unfinished_requests()
    llm.stream([[1], [2]], WISHES)
    gc.collect()
    assert not llm.engine.has_unfinished_requests()
    check_empty(llm.engine)


def test_ids_of_samples_never_meet_ids_of_users():
    llm = mock_llm()
    llm.engine.add_request("0/1", [1], WISHES)
    outputs = llm.generate([[2]], SamplingParams(n=2, seed=1, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert outputs[0].finished and outputs[0].request_id != "0"
    with pytest.raises(ValueError, match="request_id='0/1' is in use"):  # complete, but nobody has taken it yet
        llm.engine.add_request("0/1", [1], WISHES)
    assert tokens(llm.engine.step()) == [EXPECTED[1]]
    check_empty(llm.engine)


def test_generate_batch_takes_every_form_of_prompts():
    engine = mock_engine()
    forms = ([1], [[1]], {"prompt_token_ids": [1]}, [{"prompt_token_ids": [1]}])
    assert [tokens(engine.generate_batch(f, WISHES).values()) for f in forms] == [[EXPECTED[1]]] * 4
    with pytest.raises(ValueError, match="prompts=None is not valid"):
        engine.generate_batch(None, WISHES)


def test_memory_does_not_grow_with_the_number_of_requests():
    engine = mock_engine()
    engine.core.recorder.trace = type(engine.core.trace)(10)
    wishes = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)

    def work() -> None:
        for i in range(100):
            engine.add_request(str(i), [1, 2, i % 60], wishes)
            engine.core.runner.steps.clear()
            if i % 3 == 0:
                engine.step()
                engine.abort_request(str(i))
        drain(engine)
        gc.collect()

    work()
    tracemalloc.start()
    work()
    before = tracemalloc.get_traced_memory()[0]
    work()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 20_000  # bytes; 100 requests kept alive would be far more


def make_request(**kwargs) -> Request:
    fields = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "sampling_params": SamplingParams(),
        "eos_token_ids": (0,),
    }
    return Request(**{**fields, "max_model_len": 32, **kwargs})


def test_life_cycle_allows_only_its_own_transitions():
    allowed = {
        ("WAITING", "RUNNING"),
        ("RUNNING", "PREEMPTED"),
        ("PREEMPTED", "RUNNING"),
        *(
            (a, f)
            for a in ("WAITING", "RUNNING", "PREEMPTED")
            for f in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_ABORTED", "FINISHED_ERROR")
        ),
    }
    for before in RequestStatus:
        for after in RequestStatus:
            request = make_request()
            request.status = before
            if (before.name, after.name) in allowed:
                request.set_status(after)
                assert request.status is after
            else:
                with pytest.raises(RuntimeError, match=f"from {before.name} to {after.name}"):
                    request.set_status(after)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(0, 9), max_size=9), st.data())
def test_tokens_slices_prompt_and_output_as_one_list(prompt, output, data):
    request = make_request(prompt_token_ids=prompt, output_token_ids=output)
    end = data.draw(st.integers(0, request.num_tokens))
    start = data.draw(st.integers(0, end))
    assert request.tokens(start, end) == (prompt + output)[start:end]


def test_a_request_that_can_never_run_is_refused_with_the_arithmetic():
    engine = mock_engine(budget=8)
    with pytest.raises(ValueError, match="the prompt has 9 tokens and a step computes at most 8"):
        engine.add_request("long", [1] * 9)
    small = mock_engine(capacity=20)
    with pytest.raises(ValueError, match=r"may grow to 25 tokens \(9 of prompt and 16 of output\).*holds 20"):
        small.add_request("large", [1] * 9)
    check_empty(engine)
    check_empty(small)


@pytest.mark.parametrize("step", [lambda e: e.step(), lambda e: e.step_for({"a", "b"}, final_only=True)])
def test_what_finished_is_not_lost_when_the_observer_of_a_step_raises(step):
    """Ctrl-C in a live view, say: the next call returns what the step completed."""
    engine = mock_engine()
    for name in "ab":
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=1, ignore_eos=True))

    def interrupted(trace):
        raise KeyboardInterrupt

    engine.on_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(engine)
    engine.on_step = None
    done = []
    while engine.has_unfinished_requests():
        done += step(engine)
    assert [o.request_id for o in done] == ["a", "b"] and all(o.finished for o in done)
    check_empty(engine)
