"""The fragmentation simulator: every slot is counted once, the allocators keep their promises, textbooks' numbers."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from folovllm.course.lessons.allocators import Allocator, Buddy, FirstFit, round_up_pow2
from folovllm.course.lessons.fragmentation import (
    POLICIES,
    SHARES,
    Capacity,
    Replay,
    SimRequest,
    capacity_of,
    draw_requests,
    mean_empty_slots,
    paged_waste,
    region_waste,
    replay,
    translate,
)
from folovllm.kv_cache.formulas import kv_bytes_per_token

# --- the allocators --------------------------------------------------------------------------------------------


def owners(allocator: Allocator, capacity: int) -> list[str]:
    """Each slot's owner, counted without trusting the allocator: a slot that two own, or nobody, shows."""
    slots = ["nobody"] * capacity
    for kind, stretches in (("region", allocator.regions), ("gap", allocator.gaps)):
        for start, length in stretches.items():
            assert length > 0
            for slot in range(start, start + length):
                assert slots[slot] == "nobody", f"slot {slot} is in two stretches"
                slots[slot] = kind
    assert "nobody" not in slots
    return slots


def longest_run(slots: list[str]) -> int:
    """The most neighbours that are all free."""
    return max(map(len, "".join("." if slot == "gap" else "x" for slot in slots).split("x")))


@given(st.data(), st.sampled_from([FirstFit, Buddy]), st.integers(1, 96))
@settings(max_examples=200, deadline=None)
def test_regions_never_overlap_and_all_memory_comes_back(
    data: st.DataObject, kind: type[FirstFit | Buddy], capacity: int
) -> None:
    allocator = kind(capacity)
    at_first = dict(allocator.gaps)
    held: dict[int, int] = {}
    for _ in range(data.draw(st.integers(0, 30))):
        if held and data.draw(st.booleans()):
            start = data.draw(st.sampled_from(sorted(held)))
            allocator.release(start)
            del held[start]
        else:
            size = data.draw(st.integers(1, capacity + 1))
            free = allocator.num_free
            before = owners(allocator, capacity)
            start = allocator.allocate(size)
            if start is None:
                assert owners(allocator, capacity) == before
                assert allocator.num_free == free
            else:
                held[start] = size
        slots = owners(allocator, capacity)
        assert allocator.num_free == slots.count("gap")
        assert allocator.regions.keys() == held.keys()
        for start, size in held.items():
            length = allocator.regions[start]
            if kind is Buddy:
                assert size <= length < 2 * size
                assert length & (length - 1) == 0 and start % length == 0
            else:
                assert length == size
    for start in held:
        allocator.release(start)
    assert allocator.gaps == at_first


@given(st.data(), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_first_fit_takes_the_lowest_gap_and_fails_only_without_one(data: st.DataObject, capacity: int) -> None:
    allocator = FirstFit(capacity)
    for _ in range(data.draw(st.integers(1, 20))):
        if allocator.regions and data.draw(st.booleans()):
            allocator.release(data.draw(st.sampled_from(sorted(allocator.regions))))
            continue
        size = data.draw(st.integers(1, capacity))
        slots = owners(allocator, capacity)
        fits = [s for s in range(capacity - size + 1) if set(slots[s : s + size]) == {"gap"}]
        assert allocator.largest_free == longest_run(slots)  # so neighbouring gaps have become one
        assert allocator.allocate(size) == min(fits, default=None)


@given(st.data(), st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_two_free_halves_always_merge(data: st.DataObject, power: int) -> None:
    allocator = Buddy(2**power)
    for _ in range(data.draw(st.integers(1, 25))):
        if allocator.regions and data.draw(st.booleans()):
            allocator.release(data.draw(st.sampled_from(sorted(allocator.regions))))
        else:
            allocator.allocate(data.draw(st.integers(1, 2**power)))
        slots = owners(allocator, 2**power)
        # Every aligned power of two that is free as a whole is one gap or inside of one, so what is free can be had.
        best = max((2**k for k in range(power + 1) for s in range(0, 2**power, 2**k)
                    if set(slots[s : s + 2**k]) == {"gap"}), default=0)  # fmt: skip
        assert allocator.largest_free == best


def test_the_textbook_buddy_example_has_104_free_and_64_does_fit() -> None:
    """128 MB, from which 32, 16 and 8 are taken; then the 32 come back. It was said that 64 would not fit."""
    memory = Buddy(128)
    assert [memory.allocate(size) for size in (32, 16, 8)] == [0, 32, 48]
    assert memory.gaps == {56: 8, 64: 64}
    memory.release(0)
    assert memory.gaps == {0: 32, 56: 8, 64: 64}
    assert (memory.num_free, memory.largest_free) == (104, 64)
    assert memory.allocate(64) == 64
    # Now 40 are free, and 33 cannot be had: in pieces of 32 and 8, and rounded up to 64.
    assert memory.num_free == 40
    assert memory.allocate(33) is None


def test_a_capacity_that_is_no_power_of_two_is_a_sum_of_them() -> None:
    memory = Buddy(100)
    assert memory.gaps == {0: 64, 64: 32, 96: 4}
    assert memory.allocate(65) is None
    assert memory.allocate(5) == 64
    memory.release(64)
    assert memory.gaps == {0: 64, 64: 32, 96: 4}


@pytest.mark.parametrize("kind", [FirstFit, Buddy])
def test_a_region_of_nothing_is_refused(kind: type[FirstFit | Buddy]) -> None:
    with pytest.raises(ValueError, match="value=0"):
        kind(8).allocate(0)
    with pytest.raises(KeyError):
        kind(8).release(0)
    assert kind(0).allocate(1) is None


# --- the lengths -----------------------------------------------------------------------------------------------


def test_the_lengths_are_skewed_and_the_same_at_every_call() -> None:
    requests = draw_requests(4000, rate=0.5, seed=7)
    assert requests == draw_requests(4000, rate=0.5, seed=7) != draw_requests(4000, rate=0.5, seed=8)
    prompts, outputs = [r.prompt_len for r in requests], [r.output_len for r in requests]
    for lengths, mean, sigma in ((prompts, 161, 1.0), (outputs, 338, 0.9)):
        # A lognormal variable of that mean has the median mean / exp(sigma^2 / 2); the cut at 1024 moves the mean only.
        assert median(lengths) == pytest.approx(mean / 2.718281828 ** (sigma**2 / 2), rel=0.06)
        assert 0.8 * mean < fmean(lengths) < 1.05 * mean
        assert min(lengths) >= 1 and max(lengths) == 1024
    assert all(r.output_len <= r.max_tokens < 2 * r.output_len for r in requests)
    assert all(r.max_tokens & (r.max_tokens - 1) == 0 for r in requests)
    gaps = [b.arrival - a.arrival for a, b in pairwise(requests)]
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(2.0, rel=0.06)  # exponential: the mean is the standard deviation
    assert fmean((gap - 2.0) ** 2 for gap in gaps) == pytest.approx(4.0, rel=0.15)


# --- the replay ------------------------------------------------------------------------------------------------

REQUESTS = draw_requests()


@pytest.fixture(scope="module")
def runs() -> dict[str, Replay]:
    return {policy: replay(REQUESTS, policy) for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_slot_is_one_thing_in_every_step(runs: dict[str, Replay], policy: str) -> None:
    run = runs[policy]
    for step in run.steps:
        kinds = [getattr(step, name) for name in SHARES]
        assert min(kinds) >= 0
        assert sum(kinds) == run.capacity == 16_384
    assert sum(run.shares.values()) == pytest.approx(1)
    assert run.steps[-1].waiting == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_runs_a_step_per_output_token(runs: dict[str, Replay], policy: str) -> None:
    run = runs[policy]
    steps = sum(step.running for step in run.steps)
    # Written is what runs: without preemption a request's steps hold p, p + 1, ..., p + n - 1 tokens. Who gives way
    # loses no token it has, so the number of its steps is the same.
    assert steps == sum(r.output_len for r in REQUESTS)
    used = sum(step.used for step in run.steps)
    assert used == sum(r.output_len * r.prompt_len + r.output_len * (r.output_len - 1) // 2 for r in REQUESTS)


def test_better_knowledge_means_better_use_and_paging_needs_none(runs: dict[str, Replay]) -> None:
    used = {policy: run.shares["used"] for policy, run in runs.items()}
    assert used["max"] < used["pow2"] < used["oracle"] < used["paged"]
    assert used["max"] < 0.25 and used["paged"] > 0.95
    running = {policy: run.mean_running for policy, run in runs.items()}
    assert running["max"] < running["pow2"] < running["oracle"] < running["paged"]
    drained = {policy: len(run.steps) for policy, run in runs.items()}
    assert drained["max"] > drained["pow2"] > drained["oracle"] > drained["paged"]


def test_each_policy_wastes_in_its_own_way(runs: dict[str, Replay]) -> None:
    for step in runs["max"].steps:  # regions of one length leave no pieces of another
        assert step.external == 0
        assert step.used + step.reserved + step.internal == 2048 * step.running
        assert step.running <= 8
    assert max(step.external for step in runs["pow2"].steps) > 0
    assert max(step.external for step in runs["oracle"].steps) > 0
    assert all(step.internal == 0 for step in runs["oracle"].steps)
    assert all(step.external == 0 for step in runs["paged"].steps)
    assert [run.preemptions > 0 for run in runs.values()] == [policy == "paged" for policy in runs]


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_paging_wastes_less_than_a_block_per_request(block_size: int) -> None:
    run = replay(REQUESTS[:80], "paged", capacity=64 * 192, block_size=block_size)
    for step in run.steps:
        assert step.reserved + step.internal <= step.running * (block_size - 1)
    # Lengths fall on all places of a block about equally often.
    assert run.empty_per_request == pytest.approx(mean_empty_slots(block_size), rel=0.03, abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 24), st.integers(1, 16)), min_size=1, max_size=12),
    st.sampled_from(POLICIES),
    st.integers(1, 9),
    st.integers(40, 130),
)
@settings(max_examples=150, deadline=None)
def test_any_requests_drain_with_every_slot_accounted_for(
    lengths: list[tuple[int, int, int]], policy: str, block_size: int, capacity: int
) -> None:
    requests = [SimRequest(arrival, p, n, n) for arrival, p, n in lengths]
    if policy == "pow2":
        capacity = 64  # the longest, 24 + 16, becomes a region of 64
    run = replay(requests, policy, capacity + block_size, max_model_len=40, block_size=block_size)
    assert all(sum(getattr(step, name) for name in SHARES) == run.capacity for step in run.steps)
    assert sum(step.running for step in run.steps) == sum(r.output_len for r in requests)
    assert all(getattr(step, name) >= 0 for step in run.steps for name in SHARES)
    longest = max(r.arrival + r.output_len for r in requests)
    assert len(run.steps) >= longest


def test_a_small_case_by_hand() -> None:
    """16 slots. A: 3 in, 4 out, so K/V of 6. B: 5 in, 2 out, so K/V of 6. Both are there at once."""
    a, b = SimRequest(0, 3, 4, 4), SimRequest(0, 5, 2, 2)
    max_run = replay([a, b], "max", capacity=16, max_model_len=10)
    # One region of 10; the other 6 slots are too few for a second one.
    assert [(s.used, s.reserved, s.internal, s.external, s.free) for s in max_run.steps] == [
        *((3, 3, 4, 0, 6), (4, 2, 4, 0, 6), (5, 1, 4, 0, 6), (6, 0, 4, 0, 6)),
        *((5, 1, 4, 0, 6), (6, 0, 4, 0, 6)),
    ]
    # Shares are means over the four steps in which B waits.
    assert max_run.shares == {
        "used": 4.5 / 16, "reserved": 1.5 / 16, "internal": 0.25, "external": 0.0, "free": 6 / 16
    }  # fmt: skip
    assert (max_run.mean_running, max_run.empty_per_request) == (1.0, (7 + 6 + 5 + 4 + 5 + 4) / 6)
    pow2 = replay([a, b], "pow2", capacity=16)
    # 3 + 4 and 5 + 2 are both rounded up to 8.
    assert [(s.used, s.reserved, s.internal, s.free) for s in pow2.steps] == [
        *((8, 4, 4, 0), (10, 2, 4, 0), (5, 1, 2, 8), (6, 0, 2, 8)),
    ]
    paged = replay([a, b], "paged", capacity=16, block_size=4)
    # A: 1 block, then 2 from its fifth token. B: 2 blocks, of which it never writes the last two slots.
    assert [(s.used, s.reserved, s.internal, s.free) for s in paged.steps] == [
        *((8, 2, 2, 4), (10, 0, 2, 4), (5, 1, 2, 8), (6, 0, 2, 8)),
    ]


@pytest.mark.parametrize("wanted", [6, 9])
def test_free_room_in_pieces_is_external_fragmentation(wanted: int) -> None:
    """Regions of 4, 3 and 4 slots fill 11 of 12; when both of 4 have gone, 9 are free, and not even 6 can be had."""
    leaves, stays = SimRequest(0, 4, 1, 1), SimRequest(0, 1, 3, 3)
    requests = [leaves, stays, leaves, SimRequest(0, wanted, 1, 1)]
    run = replay(requests, "oracle", capacity=12)
    assert [(s.external, s.free) for s in run.steps] == [(0, 1), (9, 0), (9, 0), (0, 12 - wanted)]
    assert [s.waiting for s in run.steps] == [1, 1, 1, 0]
    paged = replay(requests, "paged", capacity=12, block_size=1)
    assert [s.external for s in paged.steps] == [0, 0, 0]
    assert [s.running for s in paged.steps] == [3, 2, 1]  # the same slots, in pieces, are no obstacle


def test_where_blocks_run_out_the_last_to_come_gives_way_and_is_the_next_to_run() -> None:
    """4 blocks of 2. A ends with 7 tokens and B with 6, so both cannot stay; C wants 3 blocks, behind them."""
    a, b, c = SimRequest(0, 2, 6, 6), SimRequest(0, 1, 6, 6), SimRequest(0, 5, 1, 1)
    run = replay([a, b, c], "paged", capacity=8, block_size=2)
    # 2 + 1, 3 + 2, 4 + 3 tokens fill all blocks. A goes on to 7 without B, which then writes 4 at once, and on. Then C.
    assert [s.used for s in run.steps] == [3, 5, 7, 5, 6, 7, 4, 5, 6, 5]
    assert [s.running for s in run.steps] == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert [s.waiting for s in run.steps] == [1, 1, 1, 2, 2, 2, 1, 1, 1, 0]
    assert run.preemptions == 1


def test_room_is_kept_for_those_that_run_only_while_somebody_runs() -> None:
    """Of 200 blocks the BlockManager leaves 2 free when it admits beside others; alone a request may have them all."""
    nearly_all, one = SimRequest(0, 199, 1, 1), SimRequest(1, 1, 3, 3)
    run = replay([nearly_all, one, SimRequest(1, 197, 1, 1)], "paged", capacity=200, block_size=1)
    assert [(s.used, s.free) for s in run.steps] == [(199, 1), (198, 2), (2, 198), (3, 197)]
    run = replay([one, SimRequest(1, 198, 1, 1)], "paged", capacity=200, block_size=1)
    assert [s.used for s in run.steps] == [0, 1, 2, 3, 198]


def test_a_replay_refuses_what_it_can_never_do() -> None:
    request = SimRequest(0, 30, 10, 16)
    with pytest.raises(ValueError, match="policy='best'"):
        replay([request], "best")
    with pytest.raises(ValueError, match="region of 64"):
        replay([request], "pow2", capacity=63)
    with pytest.raises(ValueError, match="region of 39"):
        replay([request], "oracle", capacity=38)
    with pytest.raises(ValueError, match="region of 32; allowed: 39"):
        replay([request], "max", capacity=100, max_model_len=32)
    with pytest.raises(ValueError, match="take 3 blocks of 16"):
        replay([request], "paged", capacity=47, block_size=16)


# --- arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "paged", "reserved"),
    [(100, 10.7, 97.6), (500, 2.34, 87.8), (1000, 0.79, 75.6), (2000, 0.0, 51.2)],
)
def test_waste_of_blocks_and_of_a_region_of_4096(num_tokens: int, paged: float, reserved: float) -> None:
    assert 100 * paged_waste(num_tokens, 16) == pytest.approx(paged, abs=0.05 if paged > 10 else 0.005)
    assert 100 * region_waste(num_tokens, 4096) == pytest.approx(reserved, abs=0.05)


def test_100_tokens_leave_12_of_112_slots_empty() -> None:
    assert paged_waste(100, 16) == pytest.approx(12 / 112)


@given(st.integers(1, 5000), st.integers(1, 256))
def test_paged_waste_is_less_than_a_block(num_tokens: int, block_size: int) -> None:
    empty = paged_waste(num_tokens, block_size) * num_tokens / (1 - paged_waste(num_tokens, block_size))
    assert empty == pytest.approx(-num_tokens % block_size, abs=1e-6)


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 256])
def test_the_mean_of_empty_slots_over_all_lengths(block_size: int) -> None:
    lengths = range(1, 3 * block_size + 1)
    assert fmean(-n % block_size for n in lengths) == mean_empty_slots(block_size)


def test_the_40_gb_example() -> None:
    llama_13b = LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40)
    per_token = kv_bytes_per_token(llama_13b, 2)
    assert per_token == 800 * 1024
    assert capacity_of(12 * 2**30, per_token, 2048, 16, 500) == Capacity(15_728, 983, 7, 30)


def test_address_10000_is_found_through_the_page_table() -> None:
    assert divmod(10_000, 4096) == (2, 1808)
    table = {0: 2, 1: 5, 2: 3}
    assert translate(10_000, 4096, table) == 3 * 4096 + 1808 == 14_096
    with pytest.raises(ValueError, match="page 4"):
        translate(4 * 4096, 4096, table)
    assert translate(37, 16, [7, 2, 9]) == 9 * 16 + 5  # the same function is a slot mapping


@given(st.permutations(range(8)), st.integers(1, 64))
def test_translation_is_one_to_one(table: list[int], page_size: int) -> None:
    found = {translate(address, page_size, table) for address in range(8 * page_size)}
    assert found == set(range(8 * page_size))


def test_powers_of_two() -> None:
    assert [round_up_pow2(n) for n in (1, 2, 3, 4, 5, 1023, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]
    with pytest.raises(ValueError, match="num_tokens=11"):
        region_waste(11, 10)
    with pytest.raises(ValueError, match="num_tokens=0"):
        paged_waste(0, 16)
