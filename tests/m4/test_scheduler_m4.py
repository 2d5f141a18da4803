"""What M4 adds to the scheduler, by name: chunks beside decodes, and prefixes that are found or shared at once."""

from __future__ import annotations

import pytest

from folovllm.kv_cache.interface import BlockCopy
from tests.m3.helpers import manager_of
from tests.m4.helpers import (
    COMMON,
    add,
    all_shares,
    cached_engine,
    check_nothing_is_left,
    colliding,
    expected,
    finish,
    greedy,
    other,
    pieces,
    run,
    shares,
    step,
)

# ---------------------------------------------------------------------- chunks


def test_decodes_come_first_and_a_long_prompt_takes_what_they_leave() -> None:
    engine = cached_engine(budget=8)
    wanted = {name: add(engine, name, other(2, first), 12) for name, first in (("a", 1), ("b", 2), ("c", 3))}
    step(engine)
    wanted["long"] = add(engine, "long", COMMON[:18], 3)
    wanted["last"] = add(engine, "last", other(7, 30), 2)
    finish(engine, wanted)
    assert shares(engine)[:6] == [
        {"a": 2, "b": 2, "c": 2},
        {"a": 1, "b": 1, "c": 1, "long": 5},
        {"a": 1, "b": 1, "c": 1, "long": 5},
        {"a": 1, "b": 1, "c": 1, "long": 5},
        {"a": 1, "b": 1, "c": 1, "long": 3, "last": 2},
        {"a": 1, "b": 1, "c": 1, "long": 1, "last": 4},
    ]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("threshold", [0, 1, 5])
def test_the_budget_is_kept_and_every_decode_gets_a_token_in_every_step(budget: int, threshold: int) -> None:
    engine = cached_engine(budget=budget, num_blocks=100, long_prefill_token_threshold=threshold)
    wanted = {str(i): add(engine, str(i), other(3 + 7 * i, i), 9 - i) for i in range(5)}
    finish(engine, wanted)
    sampling: set[str] = set()
    for record in engine.trace:
        assert 0 < record.num_scheduled_tokens <= budget == record.token_budget
        scheduled = {r.request_id for r in record.requests}
        assert sampling <= scheduled
        assert all(r.num_scheduled <= (threshold or budget) for r in record.requests)
        sampling = (sampling | {r.request_id for r in record.requests if r.num_sampled}) - set(record.finished)
    assert engine.stats.prompt_tokens_computed == sum(3 + 7 * i for i in range(5)) and engine.stats.preemptions == 0


def test_only_who_has_caught_up_samples() -> None:
    engine = cached_engine(budget=6)
    finish(engine, {"r": add(engine, "r", COMMON[:15], 3)})
    steps = [(r.num_scheduled, r.num_prompt, r.num_sampled) for record in engine.trace for r in record.requests]
    assert steps == [(6, 6, 0), (6, 6, 0), (3, 3, 1), (1, 0, 1), (1, 0, 1)]
    assert [s.samples for s in all_shares(engine, "r")] == [False, False, True, True, True]
    assert engine.stats.prefill_chunks == 3 and engine.stats.prompt_tokens_computed == 15


def test_nobody_hears_of_a_request_that_still_catches_up() -> None:
    engine = cached_engine(budget=6)
    add(engine, "r", COMMON[:15], 1)
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]


def test_a_prompt_longer_than_a_step_is_accepted_with_chunks_and_refused_without() -> None:
    engine = cached_engine(budget=8)
    finish(engine, {"r": add(engine, "r", COMMON[:33], 2)})
    assert pieces(engine, "r")[:5] == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 1)]
    engine = cached_engine(budget=8, chunked_prefill=False)
    with pytest.raises(ValueError, match=r"33 tokens and a step computes at most 8; allowed: .*enable_chunked_prefill"):
        add(engine, "r", COMMON[:33], 2)
    assert not engine.has_unfinished_requests()


def test_a_prompt_that_the_pool_can_never_hold_is_refused_all_the_same() -> None:
    engine = cached_engine(budget=8, num_blocks=4)
    with pytest.raises(ValueError, match=r"may grow to 18 tokens .* take 5 blocks of 4, and the whole KV cache has 4"):
        add(engine, "r", COMMON[:17], 1)
    finish(engine, {"s": add(engine, "s", COMMON[:16], 1)})


def test_a_threshold_leaves_room_for_others_beside_a_long_prompt() -> None:
    engine = cached_engine(budget=16, long_prefill_token_threshold=10)
    wanted = {"long": add(engine, "long", COMMON[:25], 1), "short": add(engine, "short", other(6), 2)}
    wanted["third"] = add(engine, "third", other(3, 8), 1)
    finish(engine, wanted)
    assert shares(engine) == [{"long": 10, "short": 6}, {"short": 1, "long": 10, "third": 3}, {"long": 5}]


def test_without_a_threshold_a_long_prompt_takes_the_whole_step() -> None:
    engine = cached_engine(budget=16)
    wanted = {"long": add(engine, "long", COMMON[:25], 1), "short": add(engine, "short", other(6), 1)}
    finish(engine, wanted)
    assert shares(engine) == [{"long": 16}, {"long": 9, "short": 6}]


def test_prompts_in_one_piece_still_get_a_step_of_their_own_beside_a_cache() -> None:
    """What is cached need not fit: of 16 tokens 12 are found, and the other 4 stand beside the decode."""
    engine = cached_engine(budget=16, chunked_prefill=False)
    run(engine, "first", COMMON[:16])
    engine.trace.clear()
    wanted = {"runs": add(engine, "runs", other(1), 9)}
    step(engine)
    wanted["hits"] = add(engine, "hits", COMMON[:16], 2)
    wanted["long"] = add(engine, "long", other(16, 30), 1)
    finish(engine, wanted)
    assert shares(engine)[1:4] == [{"runs": 1, "hits": 4}, {"long": 16}, {"runs": 1, "hits": 1}]


def test_in_steps_of_one_token_everybody_gets_to_the_end() -> None:
    engine = cached_engine(budget=1, num_blocks=12)
    wanted = {str(i): add(engine, str(i), [*COMMON[: 4 * i], 60 + i], 3) for i in range(4)}
    finish(engine, wanted)
    assert all(record.num_scheduled_tokens == 1 for record in engine.trace)
    assert engine.stats.prompt_tokens_computed == 13 + 3  # the longest prompt, and what is not of it


# ---------------------------------------------------------------------- what is found


@pytest.mark.parametrize("length", range(1, 14))
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_full_hit_still_computes_at_least_one_token(length: int, block_size: int) -> None:
    """Somebody has to sample: the block of the last token is never taken from the cache."""
    engine = cached_engine(block_size=block_size)
    assert run(engine, "first", COMMON[:length], 3) == 0
    computed = engine.stats.prompt_tokens_computed
    cached = run(engine, "second", COMMON[:length], 3)
    assert cached == (length - 1) // block_size * block_size
    assert engine.stats.prompt_tokens_computed - computed == length - cached >= 1
    check_nothing_is_left(engine)


def test_only_full_blocks_are_shared_by_hash() -> None:
    """7 tokens in common, in blocks of 4: the second block is computed by each for itself."""
    engine = cached_engine()
    wanted = {"a": add(engine, "a", [*COMMON[:7], 1], 3), "b": add(engine, "b", [*COMMON[:7], 2], 3)}
    step(engine)
    tables = manager_of(engine).snapshot().tables
    assert tables["a"][0] == tables["b"][0] and not set(tables["a"][1:]) & set(tables["b"][1:])
    assert pieces(engine, "b") == [(4, 4)]
    finish(engine, wanted)
    assert engine.stats.copied_blocks == 0


def test_a_fork_shares_the_partial_block_and_copies_it_on_write() -> None:
    """Three samples of 7 tokens: all of them start in the second block, which has 2 tokens of the 6 they share."""
    engine = cached_engine()
    wanted = {"s": add(engine, "s", COMMON[:7], 3, n=3, seed=1)}
    step(engine)
    step(engine)
    assert [pieces(engine, f"s/{i}")[0] for i in range(3)] == [(0, 7), (6, 1), (6, 1)]
    copies = [op for record in engine.trace for op in record.kv_ops]
    assert len(copies) == 2 and all(isinstance(op, BlockCopy) for op in copies)
    finish(engine, wanted)
    assert engine.stats.prompt_tokens_computed == 7 + 2


def test_samples_of_a_cached_prompt_find_it_once_and_fork_the_rest() -> None:
    engine = cached_engine()
    run(engine, "first", COMMON[:10])
    wanted = {"s": add(engine, "s", COMMON[:10], 3, n=3, seed=1)}
    finish(engine, wanted)
    assert [pieces(engine, f"s/{i}")[0] for i in range(3)] == [(8, 2), (9, 1), (9, 1)]
    assert engine.stats.cached_tokens == 8


def test_the_output_of_one_is_a_prefix_for_the_next() -> None:
    """A conversation: the next question comes after the prompt and its answer."""
    engine = cached_engine()
    prompt = COMMON[:6]
    answer = expected(prompt, greedy(8))[0]
    run(engine, "first", prompt, 8)
    assert run(engine, "second", [*prompt, *answer, 1, 2]) == 12  # 13 tokens have K/V: the last one was never computed


def test_cached_tokens_are_told_and_counted() -> None:
    engine = cached_engine()
    run(engine, "first", COMMON[:17])
    engine.stats.reset()
    assert run(engine, "second", [*COMMON[:10], 1, 1]) == 8
    assert run(engine, "third", COMMON[:17], 3) == 16
    assert run(engine, "fourth", other(9)) == 0
    assert engine.stats.cached_tokens == 24 and engine.stats.prompt_tokens_computed == 4 + 1 + 9
    assert [r.num_cached for record in engine.trace for r in record.requests if r.request_id == "third"] == [16, 0, 0]


def test_without_a_cache_nothing_is_found() -> None:
    engine = cached_engine(caching=False)
    for i in range(3):
        assert run(engine, str(i), COMMON[:17]) == 0
    assert engine.stats.prompt_tokens_computed == 3 * 17 and engine.stats.cached_tokens == 0


def test_free_blocks_are_found_until_somebody_else_needs_them() -> None:
    engine = cached_engine(num_blocks=6)
    run(engine, "first", COMMON[:16])
    run(engine, "small", other(5))  # takes the two blocks that nobody has used yet
    assert run(engine, "again", COMMON[:16]) == 12
    run(engine, "large", other(23))
    assert run(engine, "once more", COMMON[:16]) == 0


def test_a_hash_function_that_collides_gives_no_wrong_token() -> None:
    engine = cached_engine(num_blocks=16, block_size=2, hash_function=colliding)
    wanted = {}
    for i in range(12):
        prompt = [*COMMON[: i % 4 * 3], *other(i % 3 * 2 + 1, i % 5)]
        wanted[str(i)] = add(engine, str(i), prompt, 4)
    finish(engine, wanted)


# ---------------------------------------------------------------------- who comes together


@pytest.mark.parametrize(
    ("budget", "chunked"), [(1000, True), (1000, False), (40, False), (1, True), (5, True), (16, True), (30, True)]
)
def test_16_simultaneous_requests_compute_a_common_prefix_once(budget: int, chunked: bool) -> None:
    engine = cached_engine(num_blocks=200, max_num_seqs=16, budget=budget, chunked_prefill=chunked)
    prompts = {str(i): [*COMMON[:26], i, i] for i in range(16)}
    wanted = {name: add(engine, name, prompt, 3) for name, prompt in prompts.items()}
    finish(engine, wanted)
    assert engine.stats.prompt_tokens_computed == 24 + 16 * 4  # whole blocks are shared: 6 of 4 tokens
    assert engine.stats.cached_tokens == 15 * 24
    if budget == 1000:
        assert list(shares(engine)[0].values()) == [28, *[4] * 15]


def test_with_a_threshold_below_the_prefix_requests_that_run_together_compute_it_side_by_side() -> None:
    """As in vLLM V1: each gets a chunk of its own in the first step, before any block of the second chunk exists."""
    engine = cached_engine(num_blocks=100, budget=64, long_prefill_token_threshold=8)
    wanted = {str(i): add(engine, str(i), [*COMMON[:26], i, i], 3) for i in range(2)}
    finish(engine, wanted)
    assert shares(engine)[0] == {"0": 8, "1": 8}  # the second finds the first 8 tokens, pending, and goes on from there
    assert pieces(engine, "1")[0] == (8, 8) and engine.stats.cached_tokens == 8


def test_equal_prompts_compute_all_but_their_last_block_once() -> None:
    engine = cached_engine(num_blocks=100)
    wanted = {str(i): add(engine, str(i), COMMON[:8], 2) for i in range(5)}
    finish(engine, wanted)
    assert engine.stats.prompt_tokens_computed == 8 + 4 * 4


def test_a_block_may_be_hit_in_the_step_that_writes_it() -> None:
    engine = cached_engine()
    wanted = {"a": add(engine, "a", COMMON[:9], 2), "b": add(engine, "b", [*COMMON[:8], 1], 2)}
    step(engine)
    assert shares(engine) == [{"a": 9, "b": 1}]
    finish(engine, wanted)


def test_prefixes_that_branch_are_each_computed_once() -> None:
    """Two documents, and questions to each: whoever shares what has a leader of its own."""
    engine = cached_engine(num_blocks=100, budget=6)
    wanted = {}
    for i in range(4):
        for j in range(3):
            name = f"{i}.{j}"
            wanted[name] = add(engine, name, [*COMMON[:8], *other(8, 10 * i), 7 * j], 2)
    finish(engine, wanted)
    assert engine.stats.prompt_tokens_computed == 8 + 4 * 8 + 12
