"""The live view of M4: chunks, hits and evictions are what the scheduler and the block manager have in their books."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from folovllm import SamplingParams
from folovllm.course.viz.live_blocks import MOST_NEXT, crowded_cell, device_map
from folovllm.course.viz.live_state import LiveState
from folovllm.kv_cache.interface import BlockSnapshot
from tests.m3.helpers import check_all_free, manager_of
from tests.m3.test_live_blocks import cells_of, drawn, line_of, state_of
from tests.m4.helpers import cached_engine

prompts = st.tuples(st.integers(0, 3), st.integers(1, 14))  # blocks in common with all others, tokens in all


def prompt_of(number: int, shared: int, length: int) -> list[int]:
    """Tokens that begin as those of all requests do, and then are the request's own."""
    common = [1 + i for i in range(4 * shared)][:length]
    return common + [20 + number] * (length - len(common))


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(1, 8)), min_size=1, max_size=6),
    num_blocks=st.integers(7, 16),
    budget=st.sampled_from([3, 8, 64]),
    mode=st.sampled_from(["recompute", "swap"]),
    ascii_only=st.booleans(),
)
def test_after_every_step_the_view_is_what_the_books_say(requests, num_blocks, budget, mode, ascii_only):
    engine = cached_engine(num_blocks, num_host_blocks=num_blocks, preemption_mode=mode, max_num_seqs=3, budget=budget)
    manager, num_evicted = manager_of(engine), 0
    evict = manager.cache.evict

    def counted(block: int) -> None:
        nonlocal num_evicted
        num_evicted += block in manager.cache._by_block
        evict(block)

    manager.cache.evict = counted
    for number, ((shared, length), output) in enumerate(requests):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add_request(f"r{number}", prompt_of(number, shared, length), params)
    state, cached_before = state_of(engine), False
    while engine.has_unfinished_requests():
        engine.step()
        state.observe(engine.trace[-1])
        lines = drawn(state, 80, ascii_only)
        assert {cell_len(line) for line in lines} == {80}
        idle = [block for block in manager.pool.free_list() if block in manager.cache._by_block]
        free, cached = ("_ ", "o ") if ascii_only else ("· ", "◦ ")
        cells = cells_of(lines, num_blocks)
        assert [i for i, cell in enumerate(cells, 1) if cell == cached] == sorted(idle)
        assert sum(cell == free for cell in cells) == manager.pool.num_free - len(idle)
        cached_before |= len(manager.cache) > 0
        assert any(line[2:].startswith("cache ") for line in lines) == cached_before
        if cached_before:
            following = "; evict next " + ", ".join(map(str, idle[:MOST_NEXT])) if idle else ""
            told = f"%; {num_evicted} evicted; {len(idle)} free{following}"
            assert re.fullmatch(r"hit rate \d+" + re.escape(told), line_of(lines, "cache"))
        for share in engine.trace[-1].requests:
            row = next(line.split() for line in lines if re.match(rf".\s+([A-Z] +)?{share.request_id}\s", line))
            in_part = share.status == "RUNNING" and share.num_prompt > 0 and share.num_computed < share.prompt_len
            if "recompute" not in row:
                assert (f"chunk of {share.num_scheduled} " in " ".join(row)) == in_part
    check_all_free(engine)


def test_hits_are_told_for_as_long_as_the_request_runs():
    engine = cached_engine(32)
    for number in range(2):
        engine.add_request(str(number), prompt_of(number, 2, 10), SamplingParams(max_tokens=3, ignore_eos=True))
        engine.step()
    state = state_of(engine)
    engine.add_request("2", prompt_of(2, 2, 10), SamplingParams(max_tokens=4, ignore_eos=True))
    for _ in range(3):
        engine.step()
        state.observe(engine.trace[-1])
        (row,) = [line for line in drawn(state, 80) if re.search(r" 2 +(prefill|decode) ", line)]
        assert " 10, 8 cached " in row
    assert line_of(drawn(state, 80), "cache").startswith("hit rate 80%; 0 evicted; ")


def test_the_share_of_hits_is_that_of_prompt_tokens():
    engine = cached_engine(32)
    assert engine.stats.hit_rate is None
    for number in range(3):
        engine.add_request(str(number), prompt_of(number, 2, 10), SamplingParams(max_tokens=1, ignore_eos=True))
        engine.step()
    assert engine.stats.cached_tokens == 16 and engine.stats.hit_rate == 16 / 30


def test_a_run_that_begins_in_a_used_pool_has_evicted_nothing_yet():
    engine = cached_engine(8)
    for number in range(6):  # more than the pool can keep
        engine.add_request(str(number), prompt_of(number, 0, 12), SamplingParams(max_tokens=1, ignore_eos=True))
        engine.step()
    state = state_of(engine)
    engine.add_request("9", [5], SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.trace[-1].blocks is not None and engine.trace[-1].blocks.num_evicted > 0
    state.observe(engine.trace[-1])
    assert state.num_evicted == 0


def test_without_a_cache_nothing_is_said_of_one():
    engine = cached_engine(16, caching=False)
    engine.add_request("0", [1] * 9, SamplingParams(max_tokens=2, ignore_eos=True))
    state: LiveState = state_of(engine)
    engine.step()
    state.observe(engine.trace[-1])
    text = "\n".join(drawn(state, 80))
    assert "cache" not in text and "◦" not in text


def test_cells_of_several_blocks_say_what_is_only_cached():
    assert crowded_cell([], 10, False, any_cached=True)[0] == "◦" and crowded_cell([], 10, True, True)[0] == "o"
    assert crowded_cell([0], 10, False, any_cached=True)[0] == "▁" and crowded_cell([], 10, False)[0] == "·"
    counts = (0, 1, *[0] * 999)
    snapshot = BlockSnapshot(4, {"a": (1,)}, {}, counts, counts, 999, tuple(range(2, 1001)), {21: None, 1000: None})
    lines, size = device_map(snapshot, {"a": 0}, 65, 2, ascii_only=False)
    cells = "".join(line.plain.split()[1] for line in lines)
    assert size == 10 and cells == "▁·◦" + "·" * 96 + "◦"
