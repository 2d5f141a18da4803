"""What the scheduler does when K/V comes in blocks, by name: who gives way, who comes back, who stays, who may join."""

from __future__ import annotations

from typing import Any

import pytest

from folovllm import LLMEngine, SamplingParams
from folovllm.kv_cache.interface import BlockCopy, BlockPlan, SwapIn, SwapOut
from folovllm.messages import SchedulerOutput
from folovllm.request import RequestStatus
from tests.m3.helpers import Finished, check_all_free, manager_of, run_to_the_end
from tests.mock import PagedMockRunner, first_scheduled, mock_tokens, paged_mock_engine

MODES = pytest.mark.parametrize("mode", ["recompute", "swap"])


def wishes(max_tokens: int | None, **kwargs: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kwargs)


def prompt_of(request_id: str, length: int) -> list[int]:
    """A prompt that only this request has."""
    return [(sum(map(ord, request_id)) + 7 * i) % 64 for i in range(length)]


def add(engine: LLMEngine, request_id: str, prompt: int, max_tokens: int, priority: int = 0, **kwargs: Any) -> None:
    engine.add_request(request_id, prompt_of(request_id, prompt), wishes(max_tokens, **kwargs), priority)


def shares(engine: LLMEngine) -> list[dict[str, int]]:
    """Per step: request id -> tokens computed."""
    return [{r.request_id: r.num_scheduled for r in step.requests} for step in engine.trace]


def running(engine: LLMEngine) -> list[str]:
    return [r.request_id for r in engine.core.scheduler.running]


def check_tokens(done: Finished, request_id: str, prompt: int, params: SamplingParams, max_model_len: int = 64) -> None:
    expected = [mock_tokens(prompt_of(request_id, prompt), params.child(k), max_model_len)[0] for k in range(params.n)]
    assert done[request_id][0] == expected


def steps_until(engine: LLMEngine, happened: Any, limit: int = 200) -> None:
    """Step until `happened(engine)`, which must come."""
    for _ in range(limit):
        if happened(engine):
            return
        engine.step()
    raise AssertionError("it did not happen")


def preempted(engine: LLMEngine) -> list[str]:
    return [i for step in engine.trace for i in step.preempted]


# ---------------------------------------------------------------------- who gives way


@MODES
@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_who_came_last_gives_way(policy: str, mode: str) -> None:
    """Three requests of 4 tokens fill 3 of 4 blocks; the fourth block goes to the first, and then "c" has to go."""
    engine = paged_mock_engine(num_blocks=4, num_host_blocks=4, policy=policy, preemption_mode=mode)
    for name in "abc":
        add(engine, name, 4, 8)
    engine.step()
    assert running(engine) == ["a", "b", "c"]
    engine.step()
    assert engine.trace[-1].preempted == ["c"] and shares(engine)[-1] == {"a": 1, "b": 1}
    assert engine.core.scheduler.requests["c"].status is RequestStatus.PREEMPTED
    done = run_to_the_end(engine)
    for name in "abc":
        check_tokens(done, name, 4, wishes(8))
    check_all_free(engine)


@MODES
def test_the_lowest_priority_gives_way_whenever_it_came(mode: str) -> None:
    engine = paged_mock_engine(num_blocks=4, num_host_blocks=4, policy="priority", preemption_mode=mode)
    for name, priority in (("b", 5), ("a", 0), ("c", 5)):
        add(engine, name, 4, 8, priority)
        engine.step()
    assert running(engine) == ["b", "a"]  # "b" has the third block and "a" the fourth, so "c" did not get in
    steps_until(engine, preempted)
    assert preempted(engine) == ["b"] and running(engine) == ["a"]
    done = run_to_the_end(engine)
    for name in "abc":
        check_tokens(done, name, 4, wishes(8))
    check_all_free(engine)


def test_among_equal_priorities_who_came_last_gives_way() -> None:
    engine = paged_mock_engine(num_blocks=4, policy="priority")
    for name, priority in (("a", 1), ("b", 1), ("urgent", 0)):
        add(engine, name, 4, 8, priority)
    engine.step()
    engine.step()
    assert preempted(engine) == ["b"]


def test_of_samples_of_one_prompt_the_last_gives_way() -> None:
    """They arrive at one and the same time, and the leader, whose blocks the others fork, must not go first."""
    engine = paged_mock_engine(num_blocks=8, policy="priority")
    add(engine, "s", 5, 20, n=3, seed=1)
    steps_until(engine, preempted)
    assert preempted(engine) == ["s/2"]
    check_tokens(run_to_the_end(engine), "s", 5, wishes(20, n=3, seed=1))
    check_all_free(engine)


def test_a_request_gives_way_itself_if_nobody_came_after_it() -> None:
    engine = paged_mock_engine(num_blocks=3, block_size=4)
    add(engine, "a", 5, 7)
    add(engine, "b", 4, 8)
    engine.step()
    engine.step()
    assert preempted(engine) == ["b"] and shares(engine)[-1] == {"a": 1}
    done = run_to_the_end(engine)
    check_tokens(done, "a", 5, wishes(7))
    check_tokens(done, "b", 4, wishes(8))
    check_all_free(engine)


def test_as_many_give_way_as_are_needed_and_no_more() -> None:
    """The two that came last share their blocks, so that the first of them frees one only by going with the other."""
    engine = paged_mock_engine(max_num_seqs=5, num_blocks=6, block_size=4)
    add(engine, "a", 8, 9)
    add(engine, "b", 4, 9)
    add(engine, "s", 5, 3, n=2, seed=1)  # 2 blocks; its child shares the first and copies none: 1 more
    engine.step()
    assert manager_of(engine).pool.num_free == 1
    engine.step()  # "a" takes the last free block; "b" takes the one that "s/0" has to itself
    assert engine.trace[-1].preempted == ["s/0"] and shares(engine)[-1] == {"a": 1, "b": 1}
    assert engine.core.scheduler.requests["s/1"].status is RequestStatus.WAITING
    check_tokens(run_to_the_end(engine), "s", 5, wishes(3, n=2, seed=1))


def test_a_share_that_was_planned_already_is_taken_back() -> None:
    """ "low" came first and is planned first; when "high" finds no block, its share of the same step goes, too."""
    engine = paged_mock_engine(num_blocks=4, block_size=4, policy="priority")
    add(engine, "low", 3, 12, priority=1)
    engine.step()
    add(engine, "high", 8, 8, priority=0)
    engine.step()
    assert running(engine) == ["low", "high"] and manager_of(engine).pool.num_free == 1
    engine.step()  # "low" is at position 4 and takes the last block; "high" is at 8
    assert engine.trace[-1].preempted == ["low"] and shares(engine)[-1] == {"high": 1}
    done = run_to_the_end(engine)
    check_tokens(done, "low", 3, wishes(12))
    check_tokens(done, "high", 8, wishes(8))
    check_all_free(engine)


# ---------------------------------------------------------------------- how it comes back


def test_recompute_starts_again_at_0_with_prompt_and_output() -> None:
    engine = paged_mock_engine(num_blocks=4, block_size=4, num_host_blocks=4)
    add(engine, "a", 7, 9)
    add(engine, "b", 7, 3)
    steps_until(engine, preempted)
    known = engine.core.scheduler.requests["b"].num_tokens
    assert known == 7 + 2 and manager_of(engine).get_computed_blocks(engine.core.scheduler.requests["b"]) == 0
    run_to_the_end(engine)
    back = [s for step in engine.core.runner.steps for s in step.scheduled if s.request_id == "b"]
    assert [(s.start, s.num_tokens) for s in back] == [(0, 7), (7, 1), (0, 9)]
    stats = engine.stats
    assert (stats.preemptions, stats.swapped_out_blocks, stats.swapped_in_blocks) == (1, 0, 0)
    assert stats.prompt_tokens_computed == 7 + 7 + 7 and stats.generated_tokens == 9 + 3
    check_all_free(engine)


def test_swap_goes_on_where_it_stopped() -> None:
    engine = paged_mock_engine(num_blocks=4, block_size=4, num_host_blocks=2, preemption_mode="swap")
    add(engine, "a", 7, 9)
    add(engine, "b", 7, 3)
    steps_until(engine, preempted)
    manager = manager_of(engine)
    assert manager.get_computed_blocks(engine.core.scheduler.requests["b"]) == 8 and manager.host_pool.num_held == 2
    assert engine.trace[-1].kv_ops == [SwapOut(3, 1), SwapOut(4, 2)]
    run_to_the_end(engine)
    back = [s for step in engine.core.runner.steps for s in step.scheduled if s.request_id == "b"]
    assert [(s.start, s.num_tokens) for s in back] == [(0, 7), (7, 1), (8, 1)]
    assert [type(op) for op in back[-1].plan.ops] == [SwapIn, SwapIn]
    stats = engine.stats
    assert (stats.preemptions, stats.swapped_out_blocks, stats.swapped_in_blocks) == (1, 2, 2)
    assert stats.prompt_tokens_computed == 7 + 7 and stats.generated_tokens == 9 + 3
    check_all_free(engine)


def test_what_the_host_has_no_room_for_is_computed_again() -> None:
    engine = paged_mock_engine(num_blocks=4, block_size=4, num_host_blocks=1, preemption_mode="swap")
    add(engine, "a", 7, 9)
    add(engine, "b", 7, 3)
    done = run_to_the_end(engine)
    assert engine.stats.preemptions == 1 and engine.stats.swapped_out_blocks == 0
    check_tokens(done, "b", 7, wishes(3))
    check_all_free(engine)


@MODES
def test_it_comes_back_before_those_who_have_never_run(mode: str) -> None:
    engine = paged_mock_engine(max_num_seqs=2, num_blocks=4, num_host_blocks=4, preemption_mode=mode)
    for name in "abcd":
        add(engine, name, 7, 6)
    run_to_the_end(engine)
    assert set(preempted(engine)) >= {"b"}
    last = {name: max(i for i, step in enumerate(shares(engine)) if name in step) for name in "abcd"}
    assert last["a"] < last["b"] < last["c"] < last["d"]


def test_a_preempted_request_longer_than_a_step_catches_up_in_pieces() -> None:
    """4 tokens of prompt fit a step of 8. What they have become does not, and "a" takes one token of the budget."""
    engine = paged_mock_engine(max_num_seqs=2, budget=8, num_blocks=7, block_size=4)
    add(engine, "a", 4, 14)
    add(engine, "b", 4, 16)
    done = run_to_the_end(engine)
    assert set(preempted(engine)) == {"b"}
    last = max(i for i, step in enumerate(engine.trace) if step.preempted)
    back = [r for step in list(engine.trace)[last + 1 :] for r in step.requests if r.request_id == "b"]
    pieces = [r.num_scheduled for r in back]
    first, second, *rest = pieces
    known = 4 + back[0].num_output
    assert first in (7, 8) and first + second == known > 8 and set(rest) == {1}
    assert [r.num_sampled for r in back] == [0] + [1] * (len(back) - 1)  # a piece that is not the last samples nothing
    check_tokens(done, "a", 4, wishes(14))
    check_tokens(done, "b", 4, wishes(16))
    check_all_free(engine)


def test_who_catches_up_takes_what_decodes_leave_and_keeps_nobody_from_a_token() -> None:
    """Decodes go first, then whoever catches up, then those who wait: no step is given up for a head that would fit
    beside the decodes alone."""
    engine = paged_mock_engine(max_num_seqs=4, budget=8, num_blocks=64, block_size=1, max_model_len=64)
    add(engine, "a", 4, 30)
    add(engine, "b", 4, 30)
    steps_until(engine, lambda e: e.core.scheduler.requests["b"].num_tokens == 24)
    scheduler = engine.core.scheduler
    scheduler._preempt(scheduler.requests["b"], SchedulerOutput())  # as for want of room
    before = len(engine.trace)
    add(engine, "w", 5, 2)
    for _ in range(6):
        engine.step()
    assert shares(engine)[before:] == [
        {"a": 1, "b": 7},
        {"a": 1, "b": 7},
        {"a": 1, "b": 7},
        {"a": 1, "b": 3},
        {"a": 1, "b": 1, "w": 5},
        {"a": 1, "b": 1, "w": 1},
    ]
    check_tokens(run_to_the_end(engine), "b", 4, wishes(30))


def test_with_a_pool_for_one_they_take_turns_and_all_come_to_their_end() -> None:
    for mode in ("recompute", "swap"):
        engine = paged_mock_engine(budget=16, num_blocks=4, num_host_blocks=9, preemption_mode=mode)
        for i in range(6):
            add(engine, str(i), 3 + i, 13 - i)
        done = run_to_the_end(engine)
        for i in range(6):
            check_tokens(done, str(i), 3 + i, wishes(13 - i))
        assert engine.stats.preemptions >= 3
        check_all_free(engine)


@MODES
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_most_requests_are_preempted_and_say_what_they_would_have_said(policy: str, block_size: int, mode: str) -> None:
    """Samples with seeds, stop tokens and EOS among them."""
    host = 40 // block_size
    engine = paged_mock_engine(6, 24, 40, 40 // block_size, block_size, host, policy, mode)
    expected = {}
    for i in range(10):
        n = 1 + i % 3
        params = SamplingParams(
            n=n, seed=i, max_tokens=12 + i, ignore_eos=i % 2 == 0, stop_token_ids=[i] if i % 4 == 0 else None
        )
        prompt = prompt_of(str(i), 1 + 2 * i)
        engine.add_request(str(i), prompt, params, i % 3 if policy == "priority" else 0)
        expected[str(i)] = [mock_tokens(prompt, params.child(k), 40) for k in range(n)]
    done = run_to_the_end(engine)
    assert {i: list(zip(*of, strict=True)) for i, of in done.items()} == expected
    assert len(set(preempted(engine))) > 9  # of 19 sequences
    assert (engine.stats.swapped_in_blocks > 0) == (mode == "swap")
    check_all_free(engine)


# ---------------------------------------------------------------------- who joins


def test_in_a_step_that_preempts_nobody_is_admitted() -> None:
    """ "c" frees three blocks when it goes, and "small" needs one: it waits for the next step all the same."""
    engine = paged_mock_engine(num_blocks=5, block_size=4)
    add(engine, "a", 4, 4)
    add(engine, "b", 4, 4)
    add(engine, "c", 12, 4)
    engine.step()
    add(engine, "small", 1, 1)
    scheduler = engine.core.scheduler
    engine.step()
    assert engine.trace[-1].preempted == ["c"] and shares(engine)[-1] == {"a": 1, "b": 1}
    assert manager_of(engine).pool.num_free == 1 and scheduler.num_waiting == 2
    done = run_to_the_end(engine)
    check_tokens(done, "small", 1, wishes(1))


def test_the_watermark_keeps_blocks_for_those_who_run() -> None:
    engine = paged_mock_engine(num_blocks=200, block_size=1, max_model_len=200, budget=200)
    assert manager_of(engine).watermark == 2
    add(engine, "a", 100, 3)
    add(engine, "b", 99, 1)  # would leave one block
    engine.step()
    assert running(engine) == ["a"]
    engine.abort_request("b")
    add(engine, "c", 96, 2)  # 100 + 1 + 96 leaves 3
    engine.step()
    assert running(engine) == ["a", "c"]
    assert engine.stats.preemptions == 0
    run_to_the_end(engine)
    check_all_free(engine)


def test_the_watermark_holds_nobody_up_while_nothing_runs() -> None:
    engine = paged_mock_engine(num_blocks=200, block_size=1, max_model_len=200, budget=200)
    add(engine, "all of it", 199, 1)
    add(engine, "and again", 150, 50)
    done = run_to_the_end(engine)
    check_tokens(done, "all of it", 199, wishes(1), 200)
    check_tokens(done, "and again", 150, wishes(50), 200)
    assert shares(engine)[:2] == [{"all of it": 199}, {"and again": 150}]
    check_all_free(engine)


def test_a_pool_smaller_than_the_model_is_legal() -> None:
    engine = paged_mock_engine(num_blocks=5, block_size=4, max_model_len=64)
    add(engine, "fits", 10, 11)
    with pytest.raises(
        ValueError,
        match=r"request 'large' can never run: it may grow to 22 tokens \(10 of prompt and 12 of output\), all but "
        r"the last of which take 6 blocks of 4, and the whole KV cache has 5",
    ):
        add(engine, "large", 10, 12)
    done = run_to_the_end(engine)
    assert list(done) == ["fits"]
    check_tokens(done, "fits", 10, wishes(11))
    check_all_free(engine)


@pytest.mark.parametrize("n", [1, 3])
def test_who_can_never_run_is_refused_at_once_and_disturbs_nobody(n: int) -> None:
    engine = paged_mock_engine(budget=8, num_blocks=4, block_size=4)
    add(engine, "runs", 8, 8)
    engine.step()
    with pytest.raises(ValueError, match="the prompt has 9 tokens and a step computes at most 8"):
        add(engine, "longer than a step", 9, 1, n=n, seed=1)
    with pytest.raises(ValueError, match="18 tokens .* take 5 blocks of 4, and the whole KV cache has 4"):
        add(engine, "larger than the pool", 8, 10, n=n, seed=1)
    assert engine.core.scheduler.num_waiting == 0
    check_tokens(run_to_the_end(engine), "runs", 8, wishes(8))
    check_all_free(engine)


@pytest.mark.parametrize(("max_num_seqs", "budget", "most"), [(3, 64, 3), (8, 3, 3), (8, 64, 6)])
def test_no_more_run_than_seqs_or_tokens_or_blocks_allow(max_num_seqs: int, budget: int, most: int) -> None:
    engine = paged_mock_engine(max_num_seqs, budget, num_blocks=6, block_size=8)
    for i in range(9):
        add(engine, str(i), 2, 5)
    run_to_the_end(engine)
    assert engine.stats.max_running == most and engine.stats.preemptions == 0


def test_blocks_and_not_the_models_length_decide_how_many_run() -> None:
    """Reserving 64 tokens for each, 64 slots would hold one. In blocks of 4 they hold eight, until these have grown."""
    engine = paged_mock_engine(max_num_seqs=16, num_blocks=16, block_size=4, max_model_len=64)
    for i in range(8):
        add(engine, str(i), 4, 4)
    run_to_the_end(engine)
    assert engine.stats.max_running == 8 and engine.stats.preemptions == 0


def test_a_prompt_that_does_not_fit_beside_the_decodes_gets_a_step_of_its_own() -> None:
    engine = paged_mock_engine(budget=16)
    add(engine, "runs", 1, 6)
    engine.step()
    for i in range(2):
        add(engine, f"long {i}", 16, 2)
    run_to_the_end(engine)
    assert shares(engine)[1:4] == [{"long 0": 16}, {"runs": 1, "long 0": 1}, {"long 1": 16}]


def test_without_blocks_for_that_prompt_the_decodes_go_on() -> None:
    engine = paged_mock_engine(budget=16, num_blocks=5, block_size=4)
    add(engine, "runs", 5, 4)
    engine.step()
    add(engine, "long", 16, 1)
    run_to_the_end(engine)
    assert shares(engine) == [{"runs": 5}, *[{"runs": 1}] * 3, {"long": 16}]


def test_eos_ends_a_request_in_a_batch_and_its_blocks_are_free_in_the_same_step() -> None:
    candidates = ([a, b, 5] for a in range(64) for b in range(64))
    prompt = next(p for p in candidates if mock_tokens(p, SamplingParams(max_tokens=9))[1] == "stop")
    engine = paged_mock_engine(num_blocks=16, block_size=2)
    engine.add_request("eos", prompt, SamplingParams(max_tokens=9))
    add(engine, "goes on", 3, 20)
    ended = False
    while not ended:
        ended = any(o.finished for o in engine.step())
    assert engine.trace[-1].finished == ["eos"]
    assert set(manager_of(engine).snapshot().tables) == {"goes on"}
    done = run_to_the_end(engine)
    check_tokens(done, "goes on", 3, wishes(20))


# ---------------------------------------------------------------------- forks and those who are held


def test_samples_share_the_blocks_of_their_prompt_and_copy_the_last() -> None:
    engine = paged_mock_engine(num_blocks=32, block_size=4)
    add(engine, "s", 10, 4, n=4, seed=1)  # 3 blocks, the last with 2 tokens
    engine.step()
    engine.step()
    usage = manager_of(engine).usage()
    assert usage.reserved == (2 + 4) * 4 and usage.unshared == 4 * 3 * 4
    assert usage.sharing_saves == 1 - 6 / 12
    check_tokens(run_to_the_end(engine), "s", 10, wishes(4, n=4, seed=1))
    assert engine.stats.copied_blocks == 3 and engine.stats.prompt_tokens_computed == 10 + 3
    check_all_free(engine)


def test_samples_of_a_prompt_that_fills_its_blocks_copy_nothing() -> None:
    """The last prompt token of a child is the first of a block of its own."""
    engine = paged_mock_engine(num_blocks=32, block_size=4)
    add(engine, "s", 9, 4, n=4, seed=1)
    check_tokens(run_to_the_end(engine), "s", 9, wishes(4, n=4, seed=1))
    assert engine.stats.copied_blocks == 0 and engine.stats.prompt_tokens_computed == 9 + 3


def test_samples_fork_in_the_step_that_computes_the_prompt_and_the_leader_may_finish_in_it() -> None:
    engine = paged_mock_engine(max_num_seqs=1, num_blocks=32, block_size=4)
    add(engine, "s", 10, 1, n=3, seed=1)  # one token each: the leader is gone before the others run
    add(engine, "late", 3, 1)
    engine.step()
    scheduler, tables = engine.core.scheduler, manager_of(engine).snapshot().tables
    assert tables == {"s/1": (1, 2, 3), "s/2": (1, 2, 3)} and "s/0" not in scheduler.requests
    assert [r.request_id for r in scheduler.waiting.first(9)] == ["s/1", "s/2", "late"]
    check_tokens(run_to_the_end(engine), "s", 10, wishes(1, n=3, seed=1))
    assert shares(engine) == [{"s/0": 10}, {"s/1": 1}, {"s/2": 1}, {"late": 3}]
    assert engine.stats.copied_blocks == 1  # the last of the three writes into the block that it holds alone
    check_all_free(engine)


def test_samples_of_a_one_token_prompt_have_nothing_to_share() -> None:
    engine = paged_mock_engine(num_blocks=8, block_size=4)
    add(engine, "s", 1, 3, n=3, seed=1)
    engine.step()
    assert engine.core.scheduler._waiting_forks == {}
    check_tokens(run_to_the_end(engine), "s", 1, wishes(3, n=3, seed=1))
    check_all_free(engine)


@MODES
def test_waiting_forks_are_freed_before_a_running_request_is_preempted(mode: str) -> None:
    """Two may run, so the sample waits with the prompt's blocks. They are freed when "a" or the leader needs one."""
    engine = paged_mock_engine(max_num_seqs=2, num_blocks=6, num_host_blocks=8, preemption_mode=mode)
    add(engine, "a", 7, 4)
    add(engine, "s", 7, 10, n=2, seed=1)
    engine.step()
    scheduler = engine.core.scheduler
    assert list(scheduler._waiting_forks) == ["s/1"]
    scheduler.requests["s/1"].arrival_time = -1  # its rank plays no part in it
    steps_until(engine, lambda e: not e.core.scheduler._waiting_forks)
    assert engine.stats.preemptions == 0 and running(engine) == ["a", "s/0"]
    assert scheduler.requests["s/1"].num_computed_tokens == 0 and scheduler.waiting.peek_request().request_id == "s/1"
    before = engine.stats.prompt_tokens_computed
    done = run_to_the_end(engine)
    assert engine.stats.prompt_tokens_computed - before >= 7  # the sample computes the prompt
    check_tokens(done, "a", 7, wishes(4))
    check_tokens(done, "s", 7, wishes(10, n=2, seed=1))
    check_all_free(engine)


def test_a_leader_that_is_preempted_leaves_its_forks_alone() -> None:
    engine = paged_mock_engine(max_num_seqs=2, num_blocks=32, block_size=4)
    add(engine, "s", 10, 6, n=4, seed=1)
    engine.step()
    scheduler = engine.core.scheduler
    scheduler._preempt(scheduler.requests["s/0"], SchedulerOutput())
    assert manager_of(engine).snapshot().tables == {f"s/{k}": (1, 2, 3) for k in (1, 2, 3)}
    check_tokens(run_to_the_end(engine), "s", 10, wishes(6, n=4, seed=1))
    check_all_free(engine)


def test_a_leader_that_ends_before_the_prompt_is_computed_leaves_the_lead_to_the_next_sample() -> None:
    """The new leader keeps the place in the queue, and the samples keep their order."""
    engine = paged_mock_engine(max_num_seqs=1, num_blocks=32, block_size=4)
    add(engine, "first", 3, 2)
    add(engine, "s", 6, 4, n=4, seed=1)
    add(engine, "late", 3, 2)
    engine.step()
    for victim in ("s/0", "s/2"):  # the leader, and one that is parked
        engine.core.abort_requests([victim])
        engine._request_states[victim][1].abort()
    assert [r.request_id for r in engine.core.scheduler.waiting.first(9)] == ["s/1", "late"]
    done = run_to_the_end(engine)
    samples = [mock_tokens(prompt_of("s", 6), wishes(4, n=4, seed=1).child(k))[0] for k in range(4)]
    assert done["s"][0] == [[], samples[1], [], samples[3]]
    assert first_scheduled(engine) == ["first", "s/1", "s/3", "late"]
    assert engine.stats.prompt_tokens_computed == 3 + 6 + 1 + 3
    check_all_free(engine)


def test_leaders_that_fail_in_one_step_leave_the_lead_in_the_order_of_arrival() -> None:
    engine = paged_mock_engine(max_num_seqs=2, num_blocks=32, block_size=4)
    for name in "ab":
        add(engine, name, 3, 2, n=2, seed=1)
    add(engine, "c", 3, 2)
    failing(engine, before=True)
    run_to_the_end(engine)
    assert first_scheduled(engine) == ["a/1", "b/1", "c"]
    check_all_free(engine)


def test_the_samples_of_two_leaders_keep_the_order_of_arrival() -> None:
    engine = paged_mock_engine(max_num_seqs=2, num_blocks=32, block_size=4)
    for name in "ab":
        add(engine, name, 3, 2, n=3, seed=1)
    add(engine, "c", 3, 2)
    run_to_the_end(engine)
    assert first_scheduled(engine) == ["a/0", "b/0", "a/1", "a/2", "b/1", "b/2", "c"]


def hold(engine: LLMEngine, request_id: str, prompt: list[int], max_tokens: int, parent: str | None = None) -> None:
    made = engine.prepare(request_id, prompt, wishes(max_tokens), parent_id=parent, hold=True)
    engine.submit([made])


def test_a_held_request_keeps_its_blocks_until_they_are_freed() -> None:
    engine = paged_mock_engine(num_blocks=8, block_size=4)
    hold(engine, "h", prompt_of("h", 6), 3)
    run_to_the_end(engine)
    scheduler = engine.core.scheduler
    assert "h" in scheduler._held and manager_of(engine).pool.num_held == 2
    assert not engine.has_unfinished_requests() and scheduler.num_waiting == 0 and engine.core.step() == []
    engine.core.scheduler.free_held(["h", "nobody"])
    assert "h" not in scheduler._held
    check_all_free(engine)


def test_a_fork_of_a_held_request_computes_one_token() -> None:
    engine = paged_mock_engine(num_blocks=16, block_size=4)
    hold(engine, "h", prompt_of("h", 6), 3)
    tokens = prompt_of("h", 6) + run_to_the_end(engine)["h"][0][0]  # 9, of which 8 are computed
    before = engine.stats.prompt_tokens_computed
    hold(engine, "same", tokens, 4, parent="h")
    hold(engine, "other", [*tokens[:5], 1], 4, parent="h")  # a fork may part earlier
    engine.core.scheduler.free_held(["h"])  # they hold what they need
    assert engine.core.scheduler._held == {} and manager_of(engine).pool.num_held == 2
    done = run_to_the_end(engine)
    assert done["same"][0][0] == mock_tokens(tokens, wishes(4))[0]
    assert done["other"][0][0] == mock_tokens([*tokens[:5], 1], wishes(4))[0]
    assert engine.stats.prompt_tokens_computed - before == 2
    engine.core.scheduler.free_held(["same", "other"])
    check_all_free(engine)


def test_a_fork_longer_than_what_is_held_is_refused() -> None:
    engine = paged_mock_engine(num_blocks=16, block_size=4)
    hold(engine, "h", prompt_of("h", 6), 1)
    tokens = prompt_of("h", 6) + run_to_the_end(engine)["h"][0][0]
    made = engine.prepare("longer", [*tokens, 5], wishes(4), parent_id="h")
    with pytest.raises(RuntimeError, match="request 'h' has no K/V for 7 tokens to fork"):
        engine.core.add_request(made.requests[0])
    engine.core.scheduler.free_held(["h"])
    check_all_free(engine)


def test_a_fork_of_what_was_freed_starts_alone() -> None:
    engine = paged_mock_engine(num_blocks=16, block_size=4)
    hold(engine, "h", prompt_of("h", 6), 1)
    tokens = prompt_of("h", 6) + run_to_the_end(engine)["h"][0][0]
    engine.core.scheduler.free_held(["h"])
    hold(engine, "child", tokens, 4, parent="h")
    assert run_to_the_end(engine)["child"][0][0] == mock_tokens(tokens, wishes(4))[0]
    engine.core.scheduler.free_held(["child"])
    check_all_free(engine)


def test_who_did_not_finish_is_not_held() -> None:
    engine = paged_mock_engine(num_blocks=16, block_size=4)
    for name in ("aborted", "failed"):
        hold(engine, name, prompt_of(name, 3), 5)
    engine.step()
    engine.core.runner.failing = {"failed"}
    engine.step()
    engine.abort_request("aborted")
    assert not any(i in engine.core.scheduler._held for i in ("aborted", "failed"))
    check_all_free(engine)


def test_held_blocks_are_given_up_before_anybody_gives_way() -> None:
    engine = paged_mock_engine(max_num_seqs=1, num_blocks=6, block_size=4)
    hold(engine, "h", prompt_of("h", 8), 1)
    tokens = prompt_of("h", 8) + run_to_the_end(engine)["h"][0][0]
    add(engine, "a", 12, 12)
    engine.step()
    hold(engine, "child", tokens, 2, parent="h")  # waits for "a"
    steps_until(engine, lambda e: "h" not in e.core.scheduler._held)
    assert engine.stats.preemptions == 0 and running(engine) == ["a"]
    before = engine.stats.prompt_tokens_computed
    done = run_to_the_end(engine)
    assert engine.stats.preemptions == 0 and engine.stats.prompt_tokens_computed - before == 9
    assert done["child"][0][0] == mock_tokens(tokens, wishes(2))[0]
    check_tokens(done, "a", 12, wishes(12))
    engine.core.scheduler.free_held(["child"])
    check_all_free(engine)


def test_held_blocks_are_given_up_when_nothing_else_could_ever_run() -> None:
    engine = paged_mock_engine(num_blocks=4, block_size=4)
    for name in ("g", "h"):
        hold(engine, name, prompt_of(name, 5), 2)
    run_to_the_end(engine)
    assert manager_of(engine).pool.num_free == 0
    add(engine, "a", 9, 4)
    check_tokens(run_to_the_end(engine), "a", 9, wishes(4))
    assert "g" not in engine.core.scheduler._held and "h" not in engine.core.scheduler._held
    check_all_free(engine)


# ---------------------------------------------------------------------- ends before their time


@MODES
def test_abort_frees_everything_wherever_a_request_is(mode: str) -> None:
    engine = paged_mock_engine(max_num_seqs=3, num_blocks=4, num_host_blocks=8, preemption_mode=mode)
    for name in "abcd":
        add(engine, name, 4, 8)
    steps_until(engine, preempted)
    assert engine.core.scheduler.requests["c"].status is RequestStatus.PREEMPTED
    manager = manager_of(engine)
    assert (manager.host_pool.num_held > 0) == (mode == "swap")
    for name in "cadb":  # one preempted, one running, one that has never run, and the last
        engine.abort_request(name)
        manager.check()
        assert name not in manager.snapshot().tables and name not in manager.snapshot().host_tables
    check_all_free(engine)


def failing(engine: LLMEngine, before: bool) -> SchedulerOutput:
    """Interrupt the next step, before the runner has done anything or after; what it was."""
    runner = engine.core.runner
    assert isinstance(runner, PagedMockRunner)
    update, execute, steps = runner.update_states, runner.execute_model, []

    def broken_update(step: SchedulerOutput) -> None:
        steps.append(step)
        if before:
            raise KeyboardInterrupt
        update(step)

    def broken_execute(step: SchedulerOutput) -> Any:
        execute(step)
        raise KeyboardInterrupt

    runner.update_states, runner.execute_model = broken_update, broken_execute  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    runner.update_states, runner.execute_model = update, execute  # type: ignore[method-assign]
    return steps[0]


@pytest.mark.parametrize("before", [True, False])
def test_a_failed_step_that_swapped_somebody_out_makes_him_compute_his_tokens_again(before: bool) -> None:
    engine = paged_mock_engine(num_blocks=4, block_size=4, num_host_blocks=4, preemption_mode="swap")
    add(engine, "a", 7, 9)
    add(engine, "b", 7, 5)
    engine.step()
    engine.step()
    step = failing(engine, before)
    assert step.preempted_req_ids == ["b"] and [s.request_id for s in step.scheduled] == ["a"]
    scheduler = engine.core.scheduler
    assert list(scheduler.requests) == ["b"] and scheduler.waiting.peek_request().request_id == "b"
    assert manager_of(engine).pool.num_held == 0 and manager_of(engine).host_pool.num_held == 0
    done = run_to_the_end(engine)
    assert done["a"][1] == ["abort"]
    check_tokens(done, "b", 7, wishes(5))
    check_all_free(engine)


def test_the_runner_hears_of_an_end_even_if_the_step_that_told_it_failed() -> None:
    engine = paged_mock_engine(num_blocks=8)
    add(engine, "short", 2, 1)
    add(engine, "long", 2, 9)
    engine.step()
    step = failing(engine, before=True)
    assert step.finished_req_ids == ["short"] and set(engine.core.runner.known) == {"short", "long"}
    add(engine, "next", 2, 2)
    run_to_the_end(engine)
    check_all_free(engine)


# ---------------------------------------------------------------------- what a step says


def test_the_first_decode_token_runs_at_the_position_of_the_prompts_length() -> None:
    engine = paged_mock_engine(block_size=4)
    add(engine, "a", 4, 3)
    run_to_the_end(engine)
    plans = [share.plan for step in engine.core.runner.steps for share in step.scheduled]
    assert plans == [BlockPlan("a", 0, 4, (), (1,)), BlockPlan("a", 4, 1, (), (1, 2)), BlockPlan("a", 5, 1, (), (1, 2))]


def test_the_trace_says_who_gave_way_and_what_was_moved() -> None:
    engine = paged_mock_engine(num_blocks=5, block_size=4, num_host_blocks=4, preemption_mode="swap")
    add(engine, "a", 7, 9)
    add(engine, "s", 6, 5, n=2, seed=1)
    run_to_the_end(engine)
    stats, steps = engine.stats, list(engine.trace)
    ops = [op for step in steps for op in step.kv_ops]
    assert stats.preemptions == sum(len(step.preempted) for step in steps) > 0
    assert stats.swapped_out_blocks == sum(isinstance(op, SwapOut) for op in ops) > 0
    assert stats.swapped_in_blocks == sum(isinstance(op, SwapIn) for op in ops) == stats.swapped_out_blocks
    assert stats.copied_blocks == sum(isinstance(op, BlockCopy) for op in ops) > 0
    for step in steps:
        assert not set(step.preempted) & {r.request_id for r in step.requests}
        assert step.kv.used <= step.kv.reserved <= step.kv.capacity == 20
    assert ops == [op for step in engine.core.runner.steps for op in step.kv_ops]


def test_an_id_that_is_held_is_refused_before_anything_is_queued() -> None:
    engine = paged_mock_engine(num_blocks=16, block_size=4)
    hold(engine, "h", prompt_of("h", 6), 1)
    run_to_the_end(engine)
    with pytest.raises(ValueError, match="request_id='h' is in use"):
        add(engine, "h", 3, 2)
    assert not engine.has_unfinished_requests()
    engine.core.scheduler.free_held(["h"])
    check_all_free(engine)


def test_waiting_forks_that_share_all_their_blocks_with_a_running_request_stay() -> None:
    """Freeing them would free nothing, and each would compute the prompt alone."""
    engine = paged_mock_engine(max_num_seqs=2, num_blocks=8, block_size=4)
    add(engine, "s", 9, 8, n=4, seed=1)
    add(engine, "late", 4, 3)
    run_to_the_end(engine)
    assert engine.stats.prompt_tokens_computed == 9 + 3 + 4
