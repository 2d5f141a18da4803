"""Who waits for another's prefix, who comes back to its own, and that no hash stands on unwritten blocks: by name."""

from __future__ import annotations

import pytest

from folovllm import LLMEngine
from folovllm.kv_cache.interface import SwapIn
from folovllm.request import RequestStatus
from tests.m3.helpers import manager_of, run_to_the_end
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
    followers,
    give_way,
    greedy,
    other,
    pieces,
    run,
    runner_of,
    shares,
    step,
)
from tests.mock import next_token

MODES = pytest.mark.parametrize("mode", ["recompute", "swap"])


# ---------------------------------------------------------------------- followers


def test_a_follower_goes_on_in_the_very_step_that_computes_the_last_shared_block() -> None:
    """Chunks of 4 and a prefix of 14: three whole blocks in common, so the follower starts in the third step."""
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {
        "leader": add(engine, "leader", COMMON[:22], 2),
        "follower": add(engine, "follower", [*COMMON[:14], 1], 2),
    }
    waits = []
    for _ in range(3):
        step(engine)
        waits.append(followers(engine))
    assert waits == [{"follower": "leader"}, {"follower": "leader"}, {}]
    finish(engine, wanted)
    assert shares(engine)[:4] == [
        {"leader": 4},
        {"leader": 4},
        {"leader": 4, "follower": 3},
        {"follower": 1, "leader": 4},
    ]
    assert engine.trace[2].requests[1].num_cached == 12


def test_each_follower_waits_for_as_much_as_it_shares() -> None:
    engine = cached_engine(budget=12, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:20], 1)}
    for blocks in (3, 1, 2, 1):
        name = f"shares {blocks}" + " too" * (f"shares {blocks}" in wanted)
        wanted[name] = add(engine, name, [*COMMON[: 4 * blocks], 1 + len(wanted)], 1)
    finish(engine, wanted)
    assert shares(engine) == [
        {"leader": 4, "shares 1": 1, "shares 1 too": 1},
        {"leader": 4, "shares 2": 1},
        {"leader": 4, "shares 3": 1},
        {"leader": 4},
        {"leader": 4},
    ]


def test_those_who_waited_come_back_in_the_order_in_which_they_came() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4, max_num_seqs=2)
    wanted = {"leader": add(engine, "leader", COMMON[:9], 4)}
    for i in range(4):
        wanted[str(i)] = add(engine, str(i), [*COMMON[:8], i], 1)
    wanted["stranger"] = add(engine, "stranger", other(3), 1)
    finish(engine, wanted)
    first = {name: min(i for i, step in enumerate(shares(engine)) if name in step) for name in wanted}
    assert sorted(first, key=lambda name: first[name]) == ["leader", "stranger", "0", "1", "2", "3"]


def test_others_pass_a_follower_that_waits() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1)}
    wanted["follower"] = add(engine, "follower", [*COMMON[:12], 1], 1)
    wanted["stranger"] = add(engine, "stranger", other(4), 1)
    step(engine)
    assert shares(engine) == [{"leader": 4, "stranger": 4}] and followers(engine) == {"follower": "leader"}
    assert engine.core.scheduler.num_waiting == 1 and engine.core.scheduler.waiting.first(3) == []
    finish(engine, wanted)


def test_a_follower_that_wakes_goes_before_those_who_came_after_it() -> None:
    engine = cached_engine(budget=6, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:12], 1), "follower": add(engine, "follower", [*COMMON[:8], 1], 1)}
    for i in range(3):
        wanted[f"stranger {i}"] = add(engine, f"stranger {i}", other(4, 10 * i), 1)
    finish(engine, wanted)
    assert shares(engine)[:2] == [{"leader": 4, "stranger 0": 2}, {"leader": 4, "stranger 0": 2}]
    assert shares(engine)[2] == {"leader": 4, "follower": 1, "stranger 1": 1}


def test_nobody_waits_for_one_who_shares_less_than_a_block_more() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1), "b": add(engine, "b", [*COMMON[:7], 1], 1)}
    finish(engine, wanted)
    assert shares(engine)[0] == {"leader": 4, "b": 4}


def test_nobody_waits_for_one_who_waits_itself() -> None:
    """ "leader" has no place yet: both stand in line, and nobody has promised anything."""
    engine = cached_engine(budget=8, max_num_seqs=1)
    wanted = {"runs": add(engine, "runs", other(4), 5)}
    step(engine)
    wanted["leader"] = add(engine, "leader", COMMON[:16], 1)
    wanted["b"] = add(engine, "b", [*COMMON[:12], 1], 1)
    step(engine)
    assert followers(engine) == {}
    finish(engine, wanted)


@pytest.mark.parametrize("after", [1, 2])
def test_when_a_leader_is_aborted_its_follower_goes_alone_from_where_it_was(after: int) -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    add(engine, "leader", COMMON[:22], 2)
    wanted = {"follower": add(engine, "follower", [*COMMON[:14], 1], 2)}
    step(engine, after)
    engine.abort_request("leader")
    assert followers(engine) == {} and engine.core.scheduler.waiting.peek_request().request_id == "follower"
    assert sorted(cached_tokens(engine).values()) == [COMMON[: 4 * i] for i in range(1, after + 1)]
    finish(engine, wanted)
    assert pieces(engine, "follower")[0] == (4 * after, 4)


def test_when_a_leader_is_aborted_the_first_follower_leads_the_others() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4, num_blocks=100)
    add(engine, "leader", COMMON[:22], 2)
    wanted = {str(i): add(engine, str(i), [*COMMON[:20], i], 2) for i in range(4)}
    step(engine)
    engine.abort_request("leader")
    step(engine)
    assert followers(engine) == {"1": "0", "2": "0", "3": "0"}
    finish(engine, wanted)
    assert engine.stats.prompt_tokens_computed == 20 + 4


@pytest.mark.parametrize("fail_after", [False, True])
def test_when_a_leaders_step_fails_its_follower_goes_alone(fail_after: bool) -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    add(engine, "leader", COMMON[:22], 2)
    wanted = {"follower": add(engine, "follower", [*COMMON[:14], 1], 2)}
    step(engine)
    fail_once(engine, fail_after)
    assert followers(engine) == {} and list(cached_tokens(engine).values()) == [COMMON[:4]]
    finish(engine, wanted)
    assert pieces(engine, "follower")[0] == (4, 4)


def test_when_a_leader_gives_way_both_come_back_and_compute_it_once() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {
        "leader": add(engine, "leader", COMMON[:22], 2),
        "follower": add(engine, "follower", [*COMMON[:14], 1], 2),
    }
    step(engine)
    step(engine)
    give_way(engine, "leader")
    assert followers(engine) == {}
    assert [r.request_id for r in engine.core.scheduler.waiting.first(3)] == ["leader", "follower"]
    finish(engine, wanted)
    assert pieces(engine, "leader")[:3] == [(0, 4), (4, 4), (8, 4)]  # it found its own blocks again
    assert pieces(engine, "follower")[0] == (12, 3)
    assert engine.stats.prompt_tokens_computed == 22 + 3


def test_a_leader_that_samples_nothing_leaves_no_follower_behind() -> None:
    """Its logits leave no token to choose, so it ends in error in the step in which it caught up."""
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    add(engine, "leader", COMMON[:8], 5)
    wanted = {"follower": add(engine, "follower", COMMON[:12], 2)}
    step(engine)
    assert followers(engine) == {"follower": "leader"}
    runner_of(engine).failing.add("leader")
    finish(engine, wanted)
    assert pieces(engine, "follower")[0] == (8, 4)


def test_a_follower_may_be_aborted_while_it_waits() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1)}
    add(engine, "follower", [*COMMON[:12], 1], 1)
    add(engine, "second", [*COMMON[:12], 2], 1)
    step(engine)
    (output,) = engine.abort_request("follower")
    assert output.outputs[0].finish_reason == "abort" and followers(engine) == {"second": "leader"}
    finish(engine, wanted)


def test_a_follower_with_samples_keeps_its_children_parked() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1)}
    wanted["s"] = add(engine, "s", [*COMMON[:12], 1, 2], 3, n=3, seed=2)
    step(engine)
    assert followers(engine) == {"s/0": "leader"} and engine.core.scheduler.num_waiting == 3
    finish(engine, wanted)
    assert [pieces(engine, f"s/{i}")[0] for i in range(3)] == [(12, 2), (13, 1), (13, 1)]


def test_a_follower_with_samples_whose_first_is_ended_leaves_its_place_to_the_next() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1)}
    add(engine, "s", [*COMMON[:12], 1, 2], 3, n=2, seed=2)
    step(engine)
    engine.core.abort_requests(["s/0"])
    engine._request_states["s/0"][1].abort()
    finish(engine, wanted)
    assert pieces(engine, "s/1")[0] == (12, 2)


def test_priorities_hold_among_those_who_wake() -> None:
    engine = cached_engine(budget=6, policy="priority", long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1, priority=-9)}
    for name, priority in (("low", 5), ("high", -5)):
        wanted[name] = add(engine, name, [*COMMON[:12], 1], 1, priority)
    wanted["middle"] = add(engine, "middle", other(7), 1, 0)
    finish(engine, wanted)
    assert shares(engine) == [
        {"leader": 4, "middle": 2},
        {"leader": 4, "middle": 2},
        {"leader": 4, "middle": 2},
        {"leader": 4, "middle": 1, "high": 1},
        {"low": 1},
    ]


def test_an_urgent_follower_is_not_held_up_by_a_leader_that_gave_way() -> None:
    """It goes first then, and the one that it waited for finds what it computes."""
    engine = cached_engine(budget=8, policy="priority", long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:20], 1, priority=3)}
    step(engine)
    wanted["urgent"] = add(engine, "urgent", [*COMMON[:12], 1], 1, priority=0)
    step(engine)
    assert followers(engine) == {"urgent": "leader"}
    give_way(engine, "leader")
    step(engine)
    assert followers(engine) == {} and shares(engine)[-1] == {"urgent": 4, "leader": 4}
    assert pieces(engine, "urgent") == [(8, 4)] and pieces(engine, "leader")[-1] == (12, 4)
    finish(engine, wanted)
    assert engine.stats.prompt_tokens_computed == 20 + 1


def test_a_request_that_catches_up_in_pieces_leads_without_chunked_prefill_too() -> None:
    """It has become longer than a step. Who shares its output waits for it."""
    engine = cached_engine(budget=8, chunked_prefill=False, num_blocks=16)
    prompt = COMMON[:4]
    known = [*prompt, *expected(prompt, greedy(14))[0]]
    wanted = {"r": add(engine, "r", prompt, 16)}
    step(engine, 14)
    assert engine.core.scheduler.requests["r"].num_tokens == 18
    engine.core.scheduler.kv.reset_prefix_cache()
    give_way(engine, "r")
    step(engine)
    assert pieces(engine, "r")[-1] == (0, 8)
    wanted["b"] = add(engine, "b", known[:8], 2)
    wanted["c"] = add(engine, "c", [*known[:6], 1, 2], 2)
    finish(engine, wanted)
    assert pieces(engine, "b")[0] == pieces(engine, "c")[0] == (4, 4)


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


def test_a_held_leaders_failed_step_leaves_no_hash_behind() -> None:
    """Its child waits for a place, so its K/V stays; but the block that the failed step would have filled is not there
    for anybody."""
    engine = cached_engine(max_num_seqs=1)
    add(engine, "s", COMMON[:6], 9, n=2, seed=1)
    step(engine, 2)
    leader = engine.core.scheduler.requests["s/0"]
    assert leader.num_computed_tokens == 7 and engine.core.scheduler.requests["s/1"] in engine.core.scheduler.waiting
    full = leader.tokens(0, 8)
    fail_once(engine)
    assert full not in cached_tokens(engine).values()
    check_cache(engine)
    wanted = {"same": add(engine, "same", [*full, 1], 2)}
    finish(engine, wanted)


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_follows_a_leader_that_is_only_held(fails: bool) -> None:
    """It was about to compute its output again when it was ended. Its child keeps it, and it never runs again: one that
    is ahead of the child must not wait for it."""
    engine = cached_engine(max_num_seqs=1, budget=8, long_prefill_token_threshold=6, num_blocks=30, policy="priority")
    add(engine, "s", COMMON[:6], 20, 5, n=2, seed=1)
    step(engine, 12)
    known = engine.core.scheduler.requests["s/0"].tokens(0, 17)
    engine.core.scheduler.kv.reset_prefix_cache()
    give_way(engine, "s/0")
    step(engine)
    assert pieces(engine, "s/0")[-1] == (0, 6) and engine.core.scheduler.num_waiting == 1
    wanted = {"urgent": add(engine, "urgent", known, 2)}
    if fails:
        fail_once(engine)
    else:
        engine.core.abort_requests(["s/0"])
        engine._request_states["s/0"][1].abort()
    step(engine)
    assert followers(engine) == {}
    finish(engine, wanted)


def test_a_child_does_not_fork_what_a_failed_step_was_to_write() -> None:
    """Both gave way. "a" comes back first and "s/0" hits what "a" is about to write; then the step fails."""
    engine = cached_engine(max_num_seqs=2)
    add(engine, "s", COMMON[:5], 9, n=2, seed=1)
    add(engine, "a", [*COMMON[:5], 7], 9)
    scheduler = engine.core.scheduler
    step(engine)
    give_way(engine, "s/0")
    for name in [r.request_id for r in scheduler.running]:
        give_way(engine, name)
    scheduler.kv.reset_prefix_cache()
    for request in (scheduler.requests["s/1"], scheduler.requests["a"]):
        scheduler.waiting.remove_request(request)
        if request.request_id == "a":
            scheduler.waiting.prepend_request(request)
        else:
            scheduler.waiting.add_request(request)
    fail_once(engine)
    done = run_to_the_end(engine)
    assert done["s"][0][1] == expected(COMMON[:5], greedy(9, n=2, seed=1))[1]
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


def test_a_salt_separates_and_nobody_waits_for_one_of_another_salt() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"a": add(engine, "a", COMMON[:9], 1, salt="one"), "b": add(engine, "b", COMMON[:9], 1, salt="two")}
    wanted["c"] = add(engine, "c", COMMON[:9], 1)
    step(engine)
    assert shares(engine) == [{"a": 4, "b": 4}] and followers(engine) == {}
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


def test_a_follower_is_not_lost_when_the_cache_is_emptied() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 2), "follower": add(engine, "follower", COMMON[:13], 2)}
    step(engine)
    assert followers(engine) == {"follower": "leader"}
    manager_of(engine).reset_prefix_cache()
    finish(engine, wanted)
    assert pieces(engine, "follower")[0][0] == 0


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
    """As beams do it: each round forks the round before, which is let go."""
    engine = cached_engine()
    tokens = hold(engine, "0", COMMON[:7])
    for i in range(1, 6):
        tokens = hold(engine, str(i), tokens, str(i - 1))
        engine.core.let_go([str(i - 1)])
    engine.core.let_go(["5"])
    assert pieces(engine, "5") == [(11, 1)]
    assert run(engine, "a", tokens) == 12  # of 13 tokens, of which 12 have K/V
    check_nothing_is_left(engine)


def test_a_child_that_must_start_alone_finds_its_leaders_blocks() -> None:
    """The held leader's K/V is given up for a request in need. Its blocks are free then, and two still there."""
    engine = cached_engine(num_blocks=5, max_num_seqs=1)
    tokens = hold(engine, "h", COMMON[:12])
    wanted = {"a": add(engine, "a", other(8), 5)}
    step(engine)
    assert engine.core.scheduler.is_held("h")
    params = greedy(1)
    engine.submit([engine.prepare("child", tokens, params, parent_id="h")])
    step(engine)  # "a" needs a third block, and nobody gives way for it
    assert not engine.core.scheduler.is_held("h") and engine.stats.preemptions == 0
    wanted["child"] = (tokens, params)
    finish(engine, wanted)
    assert pieces(engine, "child")[0] == (8, 5)


def test_status_of_a_follower_is_that_of_one_who_waits() -> None:
    engine = cached_engine(budget=8, long_prefill_token_threshold=4)
    wanted = {"leader": add(engine, "leader", COMMON[:16], 1), "follower": add(engine, "follower", COMMON[:13], 1)}
    step(engine)
    request = engine.core.scheduler.requests["follower"]
    assert request.status is RequestStatus.WAITING and request not in engine.core.scheduler.waiting
    assert engine.trace[-1].num_waiting == 1
    finish(engine, wanted)
    assert request.num_cached_tokens == 12 and request.status is RequestStatus.FINISHED_LENGTH_CAPPED
