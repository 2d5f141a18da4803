"""The live view of blocks: each cell is what the block manager's own books say, whatever the terminal."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from folovllm import LLMEngine, SamplingParams
from folovllm.course.viz.live import LABEL, LINES_AROUND, LiveView, watch, watching
from folovllm.course.viz.live_blocks import (
    LEVELS,
    LEVELS_ASCII,
    blocks_per_cell,
    device_cell,
    device_map,
    legend_lines,
    level,
    per_row,
)
from folovllm.course.viz.live_state import LiveState
from folovllm.kv_cache.interface import BlockSnapshot
from tests.m3.helpers import check_all_free, manager_of
from tests.mock import paged_mock_engine

BLOCK_SIZE = 4
EDGE = len("│ ")


def engine_with(
    requests: list[tuple[int, int, int]], num_blocks: int, mode: str = "recompute", seqs: int = 8
) -> LLMEngine:
    """Requests "0", "1", ... wait, of (prompt tokens, output tokens, samples)."""
    engine = paged_mock_engine(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_host_blocks=num_blocks,
        preemption_mode=mode,
        max_num_seqs=seqs,
    )
    for i, (prompt, output, n) in enumerate(requests):
        params = SamplingParams(max_tokens=output, n=n, seed=i, temperature=float(n > 1), ignore_eos=True)
        engine.add_request(str(i), [1 + i % 60] * prompt, params)
    return engine


def state_of(engine: LLMEngine) -> LiveState:
    engine.core.recorder.trace_blocks = True
    return LiveState(engine.core.scheduler.num_waiting, max_running=engine.core.scheduler.max_num_running_reqs)


def drawn(state: LiveState, width: int, ascii_only: bool = False, rows: int = 20) -> list[str]:
    """The lines of the view on a console of that width, without colour."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
    console = Console(record=True, width=width, file=file, legacy_windows=False, _environ={})
    console.print(LiveView(state, rows))
    return console.export_text().splitlines()


def line_of(lines: list[str], label: str) -> str:
    """The words behind a label."""
    (line,) = [line[EDGE + LABEL : -EDGE].rstrip() for line in lines if line[EDGE:].startswith(f"{label} ")]
    return line


def cells_of(lines: list[str], num_blocks: int) -> list[str]:
    """The map's cells of two characters, block 1 first."""
    start = next(i for i, line in enumerate(lines) if line[EDGE:].startswith("blocks "))
    digits = len(str(num_blocks))
    cells: list[str] = []
    for line in lines[start:]:
        text = line[EDGE + LABEL : -EDGE]
        if len(cells) == num_blocks:
            break
        assert int(text[:digits]) == len(cells) + 1, "a row begins with the number of its first block"
        row = text[digits + 1 :].rstrip()
        cells += [f"{row[i : i + 2]:2}" for i in range(0, len(row), 2)]
    return cells


def check_map(engine: LLMEngine, state: LiveState, lines: list[str], ascii_only: bool) -> None:
    """Every cell against the books."""
    manager, (dot, levels) = manager_of(engine), ("_", LEVELS_ASCII) if ascii_only else ("·", LEVELS)
    cells = cells_of(lines, manager.pool.num_blocks)
    letters: dict[str, set[str]] = {}
    tables = {request_id: table.blocks for request_id, table in manager._tables.items()}
    for block, cell in enumerate(cells, start=1):
        count, filled = manager.pool.ref_cnt[block], manager.pool.filled[block]
        assert (cell == f"{dot} ") == (count == 0)
        if count == 0:
            continue
        assert cell[0].isupper() == (filled == BLOCK_SIZE)
        if count > 1:
            assert cell[1] == str(count)
        elif filled == BLOCK_SIZE:
            assert cell[1] == " "
        else:
            assert cell[1] == {1: levels[3], 2: levels[5], 3: levels[7]}[filled]
        if count == 1:
            (owner,) = [i for i, table in tables.items() if block in table]
            letters.setdefault(owner, set()).add(cell[0].upper())
    assert all(len(found) == 1 for found in letters.values()), "a request has one letter"
    assert len(set.union(set(), *letters.values())) == len(letters), "and it is its own"
    for lane in state.lanes:
        if lane is not None and lane.share.request_id in letters:
            (letter,) = letters[lane.share.request_id]
            assert any(re.match(rf"[│|] {letter}  {lane.share.request_id} ", line) for line in lines)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=6),
    num_blocks=st.integers(6, 20),
    mode=st.sampled_from(["recompute", "swap"]),
    width=st.sampled_from([60, 80, 120]),
    ascii_only=st.booleans(),
)
def test_after_every_step_the_map_is_the_managers(requests, num_blocks, mode, width, ascii_only):
    engine = engine_with(requests, num_blocks, mode)
    manager, state = manager_of(engine), state_of(engine)
    while engine.has_unfinished_requests():
        engine.step()
        state.observe(engine.trace[-1])
        lines = drawn(state, width, ascii_only)
        assert {cell_len(line) for line in lines} == {width}
        assert not ascii_only or all(ord(c) < 128 for line in lines for c in line[EDGE:-EDGE] if c not in "─╭╮╰╯│")
        check_map(engine, state, lines, ascii_only)
        shared = sum(count > 1 for count in manager.pool.ref_cnt)
        counts = f"{manager.pool.num_held} held, {shared} of them shared, {manager.pool.num_free} free"
        assert line_of(lines, "pool").startswith(counts)
        preempted = {r.request_id for r in engine.core.scheduler.requests.values() if r.status.name == "PREEMPTED"}
        assert set(state.preempted) == preempted
        if manager.host_pool.num_held:
            host = line_of(lines, "host").split()
            assert len(host) == manager.host_pool.num_held
            on_host = {i for i, table in manager._tables.items() if table.host_blocks}
            assert len(set(host)) == len(on_host) <= len(preempted)
    check_all_free(engine)


def test_a_request_keeps_its_letter_while_it_is_away():
    engine = engine_with([(6, 14, 1), (6, 14, 1), (6, 14, 1)], num_blocks=8)
    state, numbers = state_of(engine), {}
    away: set[str] = set()
    while engine.has_unfinished_requests():
        engine.step()
        state.observe(engine.trace[-1])
        away |= set(state.preempted)
        for request_id, number in state.owners.items():
            assert numbers.setdefault(request_id, number) == number
    assert away and set(numbers) == {"0", "1", "2"} and state.owners == {}


def test_preempted_requests_are_named_with_what_became_of_their_blocks():
    lines: dict[str, list[str]] = {}
    for mode in ("recompute", "swap"):
        engine = engine_with([(8, 8, 1)] * 5, num_blocks=10, mode=mode)
        state = state_of(engine)
        assert "preempted" not in "".join(drawn(state, 80))  # before the first step nothing is known of blocks
        while engine.has_unfinished_requests():
            engine.step()
            state.observe(engine.trace[-1])
            lines.setdefault(mode, []).append(line_of(drawn(state, 80), "preempted"))
        assert lines[mode][0] == "none so far"
        assert lines[mode][-1] == f"none now, {engine.stats.preemptions} times so far"
    away = [line for mode in lines for line in lines[mode] if "none" not in line]
    assert any(re.fullmatch(r"\d(, \d)+ dropped", line) for line in lines["recompute"])
    assert any(re.fullmatch(r"[A-E]  \d(, [A-E]  \d)+ on the host", line) for line in lines["swap"])
    assert {"host" in line for line in lines["recompute"]} == {False} and away


def test_what_the_step_did_with_blocks_is_said():
    engine = engine_with([(6, 4, 2)], num_blocks=8)
    state, words = state_of(engine), []
    while engine.has_unfinished_requests():
        engine.step()
        state.observe(engine.trace[-1])
        words.append(line_of(drawn(state, 80), "pool").partition("; ")[2])
    assert words[1] == "in this step 1 copied" and set(words) == {"", words[1]}


def test_the_view_does_not_outgrow_its_rows():
    engine = engine_with([(12, 6, 1)] * 12, num_blocks=400)
    state = state_of(engine)
    engine.step()
    state.observe(engine.trace[-1])
    for rows in (10, 13, 20, 40):
        for width in (60, 80, 120):
            assert len(drawn(state, width, rows=rows)) <= rows + LINES_AROUND


# --- pools that are too large ------------------------------------------------------------------------------


def pool(num_blocks: int, tables: dict[str, tuple[int, ...]]) -> BlockSnapshot:
    """A snapshot in which every block that is held is full."""
    counts = [0] * (num_blocks + 1)
    for table in tables.values():
        for block in table:
            counts[block] += 1
    filled = tuple(BLOCK_SIZE * (count > 0) for count in counts)
    return BlockSnapshot(BLOCK_SIZE, tables, {}, tuple(counts), filled, counts[1:].count(0))


@given(num_blocks=st.integers(1, 300_000), width=st.integers(2, 200), rows=st.integers(1, 30))
def test_a_pool_of_any_size_fits(num_blocks, width, rows):
    size = blocks_per_cell(num_blocks, width, rows)
    if size == 1:
        assert num_blocks <= rows * (width // 2)
        return
    assert num_blocks <= size * rows * width
    assert num_blocks > rows * per_row(width // 2), "there was room for each of them"
    assert str(size).rstrip("0") in ("1", "2", "5")


def test_several_blocks_in_a_cell():
    # 2000 blocks on 4 rows of 60: 10 in a cell. a holds 1 to 100, b every second one up to 200; 301 to 310 are shared.
    tables = {"a": (*range(1, 101), *range(301, 311)), "b": (*range(102, 201, 2), *range(301, 311)), "c": (1991,)}
    lines, size = device_map(pool(2000, tables), {"a": 0, "b": 1, "c": 2}, 65, 4, ascii_only=False)
    assert size == 10 and len(lines) == 4
    rows = [line.plain for line in lines]
    assert [row[:5] for row in rows] == ["   1 ", " 601 ", "1201 ", "1801 "]
    cells = "".join(row[5:] for row in rows)
    assert cells[:31] == "█" * 10 + "▄" * 10 + "·" * 10 + "█" and set(cells[31:199]) == {"·"}
    assert cells[199] == "▁" and len(cells) == 200
    styles = {str(span.style) for span in lines[0].spans if 5 <= span.start < 15}
    assert len(styles) == 1 and styles.isdisjoint({str(s.style) for s in lines[0].spans if 15 <= s.start < 25})
    assert "white" in {str(span.style) for span in lines[0].spans if span.start == 35}


def test_the_last_cell_is_full_when_its_few_blocks_are():
    tables = {"a": tuple(range(1, 1004))}
    lines, size = device_map(pool(1003, tables), {"a": 0}, 65, 2, ascii_only=True)
    assert size == 10 and {c for line in lines for c in line.plain[5:]} == {"@"}


@pytest.mark.parametrize(("ascii_only", "levels"), [(False, LEVELS), (True, LEVELS_ASCII)])
def test_levels_are_rounded_up_and_all_different(ascii_only, levels):
    assert len(set(levels)) == 9 and level(0, 100, ascii_only) == " "
    assert level(1, 100, ascii_only) == levels[1] and level(99, 100, ascii_only) == levels[8] == level(5, 5, ascii_only)
    assert level(50, 100, ascii_only) == levels[4] and level(51, 100, ascii_only) == levels[5]


def test_the_legend_says_how_many_blocks_a_cell_has():
    engine = engine_with([(12, 6, 1)], num_blocks=4000)
    state = state_of(engine)
    engine.step()
    state.observe(engine.trace[-1])
    assert line_of(drawn(state, 80), "legend") == "1 cell = 20 blocks  ▁ to █ held  · all free"
    assert line_of(drawn(state, 80, True), "legend") == "1 cell = 20 blocks  . to @ held  _ all free"


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_the_legend_has_every_kind_of_cell(ascii_only, block_size):
    """Over every block there can be: free, in the cache, and in 1 to 12 block tables, filled with 0 to all slots."""
    counts = [0, 0, 0, *(holders for holders in range(1, 13) for _ in range(block_size + 1))]
    filled = [0, 0, 0, *list(range(block_size + 1)) * 12]
    blocks = BlockSnapshot(block_size, {}, {}, tuple(counts), tuple(filled), 2, (1, 2), {2: None})
    cells = {device_cell(blocks, i, None if i < 3 else 7, ascii_only)[0] for i in range(1, len(counts))}
    (line,) = legend_lines(1, 200, ascii_only, uses_cache=True)
    words = line.plain.split()
    low, high = words[words.index("to") - 1], words[words.index("to") + 1]
    heights = (LEVELS_ASCII if ascii_only else LEVELS)[1:]
    heights = heights[heights.index(low) : heights.index(high) + 1]
    explained = {" ", *heights, *"23456789", "+"}  # of second characters; "A3" explains the digits
    assert {"A3", "A+", "A", "a"} <= set(words) and {cell[1] for cell in cells} <= explained
    free, cached = ("_ ", "o ") if ascii_only else ("· ", "◦ ")
    assert {cell for cell in cells if not cell[0].isalpha() or cell == "o "} == {free, cached}
    assert f"{free}free" in line.plain and f"{cached}free, cached" in line.plain
    assert {cell[0] for cell in cells} == {"H", "h", free[0], cached[0]}  # letters stand for requests, as A and a do


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("size", [1, 2, 50_000])
def test_the_legend_is_whole_at_80_columns_and_its_lines_do_not_change(size, ascii_only):
    for columns in (80, 100, 160):
        width = columns - 4 - LABEL
        before, after = (legend_lines(size, width, ascii_only, uses_cache) for uses_cache in (False, True))
        assert max(map(len, after)) <= width and len(before) == len(after) == (1 if columns == 160 else 2)
        assert "cached" in after[size == 1 and len(after) - 1].plain
        assert not any("cached" in line.plain for line in before)


# --- while an engine runs ----------------------------------------------------------------------------------


def terminal(**options: object) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    environ = {"TERM": "xterm-256color"}
    console = Console(file=file, width=80, height=40, force_terminal=True, legacy_windows=False, _environ=environ)
    return console, file


@pytest.mark.parametrize("keeps", [False, True])
def test_watching_shows_blocks_and_keeps_them_only_where_the_engine_does(keeps):
    engine = engine_with([(6, 8, 2), (7, 8, 1)], num_blocks=8)
    engine.core.recorder.trace_blocks = keeps
    console, file = terminal()
    outputs = watch(console, engine, ["0", "1"], pace=0.001)
    assert [o.finished for o in outputs] == [True, True]
    assert engine.core.recorder.trace_blocks == keeps and engine.on_step is None
    assert all((step.blocks is not None) == keeps for step in engine.trace)
    assert "preempted" in file.getvalue() and "partly full" in file.getvalue()
    check_all_free(engine)


def test_whatever_runs_meanwhile_is_shown():
    """Requests that came after it began, as a beam search makes them."""
    engine = engine_with([], num_blocks=8)
    console, file = terminal()
    with watching(console, engine, pace=0.001):
        for name in ("x", "y"):
            engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
            engine.run_to_completion([name])
    shown = file.getvalue()
    assert all(f" step {number} " in shown for number in range(4))
    assert "2 of 2 finished, 4 tokens" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_an_error_meanwhile_leaves_engine_and_terminal_in_order():
    engine = engine_with([], num_blocks=8)
    console, file = terminal()
    with pytest.raises(RuntimeError, match="mine"), watching(console, engine):
        raise RuntimeError("mine")
    assert engine.on_step is None and not engine.core.recorder.trace_blocks
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
