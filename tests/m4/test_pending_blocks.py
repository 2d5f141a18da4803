"""Only written blocks are in the cache, requests that come back find their own, and forks share: by name."""

from __future__ import annotations

import pytest

from folovllm import LLMEngine
from folovllm.kv_cache.interface import SwapIn
from tests.m3.helpers import manager_of
from tests.m4.helpers import (
    COMMON,
    add,
    cache_of,
    cached_engine,
    cached_tokens,
    check_cache,
    check_nothing_is_left,
    expected,
    fail_once,
    finish,
    greedy,
    other,
    pieces,
    run,
    shares,
    step,
)
from tests.mock import next_token

MODES = pytest.mark.parametrize("mode", ["recompute", "swap"])


# ---------------------------------------------------------------------- no hash on unwritten blocks


def test_blocks_enter_the_cache_one_by_one_as_they_are_written() -> None:
    engine = cached_engine(budget=3)
    add(engine, "r", COMMON[:14], 6)
    while engine.core.has_unfinished_requests():
        step(engine)
        check_cache(engine)
        computed = 19 if not engine.core.scheduler.requests else engine.core.scheduler.requests["r"].num_computed_tokens
        assert len(cache_of(engine)) == computed // 4


def test_the_registration_is_undone_when_the_writer_gives_way_in_the_step() -> None:
    """ "low" comes first in the step and would fill its second block; then "high" finds none, and takes that one."""
    engine = cached_engine(num_blocks=4, policy="priority")
    wanted = {"low": add(engine, "low", COMMON[:6], 9, priority=1)}
    step(engine)
    wanted["high"] = add(engine, "high", other(8), 5, priority=0)
    step(engine)
    low = engine.core.scheduler.requests["low"]
    assert low.num_computed_tokens == 7 and manager_of(engine).pool.num_free == 0
    full = low.tokens(0, 8)
    step(engine)
    assert engine.trace[-1].preempted == ["low"] and shares(engine)[-1] == {"high": 1}
    found = list(cached_tokens(engine).values())
    assert full not in found and full[:4] in found
    check_cache(engine)
    wanted["same"] = add(engine, "same", [*full, 1], 2, priority=0)
    finish(engine, wanted)


def test_the_registration_is_undone_of_blocks_that_nobody_takes_at_once() -> None:
    """ "low" would fill two blocks in the step; then "high" needs two and takes one of them. To be given to somebody is
    what takes the other entry away. The one that is left free must go for a reason of its own."""
    engine = cached_engine(num_blocks=9, budget=16, long_prefill_token_threshold=8, policy="priority")
    wanted = {"low": add(engine, "low", COMMON[:25], 1, priority=1)}
    step(engine)
    wanted["high"] = add(engine, "high", other(24), 1, priority=0)
    step(engine)
    assert shares(engine) == [{"low": 8}, {"low": 8, "high": 8}]
    step(engine)
    assert engine.trace[-1].preempted == ["low"] and shares(engine)[-1] == {"high": 8}
    found = [tokens for tokens in cached_tokens(engine).values() if tokens[0] == COMMON[0]]
    assert sorted(map(len, found)) == [4, 8, 12, 16]  # what its first two steps have written
    check_cache(engine)
    wanted["same"] = add(engine, "same", [*COMMON[:24], 1], 2, priority=0)
    finish(engine, wanted)


@pytest.mark.parametrize("fail_after", [False, True])
def test_a_step_that_fails_leaves_no_hash_behind(fail_after: bool) -> None:
    engine = cached_engine()
    for name, prompt in (("a", COMMON[:9]), ("b", [*COMMON[:8], 1])):
        add(engine, name, prompt, 2)
    fail_once(engine, fail_after)
    assert len(cache_of(engine)) == 0 and not engine.core.scheduler.requests
    assert run(engine, "c", COMMON[:9]) == 0
    check_nothing_is_left(engine)


# ---------------------------------------------------------------------- who comes back


@MODES
def test_a_preempted_request_finds_its_own_blocks_output_included(mode: str) -> None:
    """ "a" takes the last block when both need one. "b" has 7 tokens of prompt and one of output in two full blocks."""
    engine = cached_engine(num_blocks=5, num_host_blocks=2, preemption_mode=mode)
    wanted = {"a": add(engine, "a", other(7), 5), "b": add(engine, "b", COMMON[:7], 5)}
    finish(engine, wanted)
    assert [i for record in engine.trace for i in record.preempted] == ["b"]
    assert pieces(engine, "b")[:3] == [(0, 7), (7, 1), (8, 1)]
    swapped = [op for record in engine.trace for op in record.kv_ops if isinstance(op, SwapIn)]
    assert len(swapped) == (2 if mode == "swap" else 0)
    assert engine.stats.prompt_tokens_computed == 14
    assert engine.stats.cached_tokens == 0  # what was found when it came back is not of its first admission


def test_what_the_host_has_no_room_for_is_found_on_the_device() -> None:
    engine = cached_engine(num_blocks=5, num_host_blocks=1, preemption_mode="swap")
    wanted = {"a": add(engine, "a", other(7), 5), "b": add(engine, "b", COMMON[:7], 5)}
    finish(engine, wanted)
    assert pieces(engine, "b")[:3] == [(0, 7), (7, 1), (8, 1)] and engine.stats.swapped_out_blocks == 0


def test_others_find_what_a_swapped_out_request_left_and_what_it_brings_back() -> None:
    engine = cached_engine(num_blocks=5, num_host_blocks=9, preemption_mode="swap")
    wanted = {"a": add(engine, "a", other(7), 5), "b": add(engine, "b", COMMON[:7], 9)}
    while not engine.stats.swapped_out_blocks:
        step(engine)
    known = engine.core.scheduler.requests["b"].tokens(0, 8)
    assert known in cached_tokens(engine).values()  # the blocks are free, and hold it still
    while not engine.stats.swapped_in_blocks:
        step(engine)
    assert known in cached_tokens(engine).values()
    check_cache(engine)
    wanted["c"] = add(engine, "c", [*known, 1], 2)
    finish(engine, wanted)
    assert pieces(engine, "c")[0] == (8, 1)


@MODES
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_most_share_and_give_way_and_say_what_they_would_have_said(policy: str, block_size: int, mode: str) -> None:
    engine = cached_engine(
        40 // block_size + 4,
        block_size,
        40 // block_size,
        max_num_seqs=6,
        budget=9,
        max_model_len=40,
        policy=policy,
        preemption_mode=mode,
    )
    wanted = {}
    for i in range(12):
        prompt = [*COMMON[: i % 4 * 6], *other(3, i)]
        wanted[str(i)] = add(engine, str(i), prompt, 14 + i, i % 3 if policy == "priority" else 0, n=1 + i % 2, seed=i)
    finish(engine, wanted, 40)
    stats = engine.stats
    assert stats.preemptions > 5 and stats.cached_tokens > 0
    assert (stats.swapped_in_blocks > 0) == (mode == "swap")


# ---------------------------------------------------------------------- salts, and a cache that is emptied


def test_a_salt_separates() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"a": add(engine, "a", COMMON[:9], 1, salt="one"), "b": add(engine, "b", COMMON[:9], 1, salt="two")}
    wanted["c"] = add(engine, "c", COMMON[:9], 1)
    step(engine)
    assert shares(engine) == [{"a": 4, "b": 4}]
    finish(engine, wanted)
    assert engine.stats.cached_tokens == 0
    assert run(engine, "d", COMMON[:9], cache_salt="two") == 8
    assert run(engine, "e", COMMON[:9], cache_salt="three") == 0
    assert run(engine, "f", COMMON[:9], cache_salt="") == 8


def test_samples_have_the_salt_of_their_prompt() -> None:
    engine = cached_engine()
    wanted = {"s": add(engine, "s", COMMON[:6], 9, salt="mine", n=2, seed=1)}
    finish(engine, wanted)
    said = [*COMMON[:6], *expected(*wanted["s"])[1]]
    assert run(engine, "a", said) == 0
    assert run(engine, "b", said, cache_salt="mine") == 12


def test_the_cache_may_be_emptied_while_requests_run() -> None:
    """They go on. Nobody finds what they have computed, nor what they compute from now on; then all is as ever."""
    engine = cached_engine(budget=8)
    wanted = {"runs": add(engine, "runs", COMMON[:20], 4)}
    step(engine)
    manager_of(engine).reset_prefix_cache()
    assert cached_tokens(engine) == {}
    wanted["new"] = add(engine, "new", COMMON[:18], 2)
    for _ in range(3):
        step(engine)
        check_cache(engine)
    assert pieces(engine, "new")[0] == (0, 4)
    finish(engine, wanted)
    assert run(engine, "later", COMMON[:18]) == 16  # what "new" computed


def test_a_cache_that_is_emptied_while_nothing_runs_is_empty() -> None:
    engine = cached_engine()
    run(engine, "a", COMMON[:17])
    manager_of(engine).reset_prefix_cache()
    assert run(engine, "b", COMMON[:17]) == 0 and run(engine, "c", COMMON[:17]) == 16


@MODES
def test_a_cache_that_is_emptied_while_somebody_has_given_way(mode: str) -> None:
    engine = cached_engine(num_blocks=5, num_host_blocks=2, preemption_mode=mode)
    wanted = {"a": add(engine, "a", other(7), 5), "b": add(engine, "b", COMMON[:7], 5)}
    while not engine.stats.preemptions:
        step(engine)
    manager_of(engine).reset_prefix_cache()
    finish(engine, wanted)
    assert pieces(engine, "b")[2] == ((8, 1) if mode == "swap" else (0, 9))


# ---------------------------------------------------------------------- held ones


def hold(engine: LLMEngine, name: str, prompt: list[int], parent: str | None = None) -> list[int]:
    """One token from a request that stays; the prompt and that token."""
    engine.submit([engine.prepare(name, prompt, greedy(1), parent_id=parent, hold=True)])
    while engine.core.has_unfinished_requests():
        step(engine)
        check_cache(engine)
    return [*prompt, next_token(prompt)]


def test_what_held_requests_have_computed_is_found_and_their_forks_are_too() -> None:
    """As beams do it: each round forks the round before, which is then freed."""
    engine = cached_engine()
    tokens = hold(engine, "0", COMMON[:7])
    for i in range(1, 6):
        tokens = hold(engine, str(i), tokens, str(i - 1))
        engine.core.scheduler.free_held([str(i - 1)])
    engine.core.scheduler.free_held(["5"])
    assert pieces(engine, "5") == [(11, 1)]
    assert run(engine, "a", tokens) == 12  # of 13 tokens, of which 12 have K/V
    check_nothing_is_left(engine)


def test_a_fork_that_lost_its_blocks_finds_them_in_the_cache() -> None:
    """Held K/V and waiting forks are freed for a request in need. Two of the blocks are still cached then."""
    engine = cached_engine(num_blocks=5, max_num_seqs=1)
    tokens = hold(engine, "h", COMMON[:12])
    wanted = {"a": add(engine, "a", other(8), 5)}
    step(engine)
    assert "h" in engine.core.scheduler._held
    params = greedy(1)
    engine.submit([engine.prepare("child", tokens, params, parent_id="h")])
    assert list(engine.core.scheduler._waiting_forks) == ["child"]
    step(engine)  # "a" needs a third block
    assert engine.core.scheduler._held == engine.core.scheduler._waiting_forks == {}
    assert engine.stats.preemptions == 0
    wanted["child"] = (tokens, params)
    finish(engine, wanted)
    assert pieces(engine, "child")[0] == (8, 5)


def test_a_fork_that_writes_into_a_cached_block_takes_it_out_of_the_cache() -> None:
    """It shares the first 2 tokens of a full block, and holds the block alone when its parent is freed."""
    engine = cached_engine(num_blocks=4)
    tokens = hold(engine, "h", COMMON[:8])
    params, prompt = greedy(1), [*tokens[:6], 63]
    engine.submit([engine.prepare("child", prompt, params, parent_id="h")])
    engine.core.scheduler.free_held(["h"])
    finish(engine, {"child": (prompt, params)})
    assert COMMON[:8] not in cached_tokens(engine).values() and run(engine, "same", COMMON[:9]) == 4
