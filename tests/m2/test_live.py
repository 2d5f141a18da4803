"""The live view: what it shows is what the scheduler did, whatever the terminal."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

from folovllm import LLMEngine, SamplingParams
from folovllm.course.viz.live import Bar, LiveView, Sparkline, can_redraw, watch
from folovllm.course.viz.live_state import LiveState
from folovllm.engine.trace import RequestStep, StepTrace, Trace
from folovllm.entrypoints.tables import phase_table, request_table, stats_table, step_table
from folovllm.kv_cache.interface import KVUsage
from folovllm.messages import SchedulerOutput
from tests.mock import MockRunner, check_empty, mock_engine, mock_tokens

POLICIES = ["fcfs", "priority", "sjf"]
TITLE = "连续批处理 [bold]is[/] a queue\n\x1b[31mwith a decision at every step"


def engine_with(sizes: list[tuple[int, int]], policy: str = "fcfs", seqs: int = 3, budget: int = 24) -> LLMEngine:
    """A mock engine in which requests "0", "1", ... wait, of (prompt tokens, output tokens) each."""
    engine = mock_engine(max_num_seqs=seqs, budget=budget, capacity=64 * (seqs + 1), policy=policy)
    for i, (prompt, output) in enumerate(sizes):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add_request(str(i), [1 + i % 60] * prompt, params, 7 * i % 5 if policy == "priority" else 0)
    return engine


def state_of(engine: LLMEngine, titles: dict[str, str] | None = None) -> LiveState:
    scheduler = engine.core.scheduler
    policy = engine.config.scheduler.scheduling_policy
    return LiveState(scheduler.num_waiting, policy, scheduler.max_num_running_reqs, titles)


def drawn(view: RenderableType, width: int) -> list[str]:
    """The lines of a view on a console of that width."""
    console = Console(record=True, width=width, file=io.StringIO(), legacy_windows=False, _environ={})
    console.print(view)
    return console.export_text().splitlines()


def queue_of(engine: LLMEngine) -> list[str]:
    """The scheduler's own queue, emptied in a copy."""
    queue = copy.deepcopy(engine.core.scheduler.waiting)
    return [queue.pop_request().request_id for _ in range(len(queue))]


def row_of(lines: list[str], request_id: str) -> list[str]:
    """The words of a request's row under the header."""
    header = next(i for i, line in enumerate(lines) if line.startswith("│ request"))
    (row,) = [line.strip("│ ").split() for line in lines[header:] if line.startswith(f"│ {request_id} ")]
    return row


# --- the state against the scheduler ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=9),
    policy=st.sampled_from(POLICIES),
    seqs=st.integers(1, 4),
    aborts=st.dictionaries(st.integers(0, 30), st.integers(0, 8), max_size=3),
)
def test_after_every_step_the_state_is_the_schedulers(requests, policy, seqs, aborts):
    engine = mock_engine(max_num_seqs=seqs, budget=24, capacity=64 * (seqs + 1), policy=policy)
    for i, (prompt, output, n) in enumerate(requests):
        params = SamplingParams(max_tokens=output, n=n, seed=i, temperature=float(n > 1))
        engine.add_request(str(i), [1 + i] * prompt, params, i % 3 if policy == "priority" else 0)
    scheduler, state = engine.core.scheduler, state_of(engine)
    live = dict(scheduler.requests)
    assert (state.num_waiting, state.num_running, state.num_requests) == (len(live), 0, len(live))
    ended = 0
    for number in range(10_000):
        if number in aborts:
            engine.abort_request(str(aborts[number]))
        engine.step()
        if not engine.has_unfinished_requests() and len(engine.trace) == number:
            break  # the abort ended the last one: there was no step
        state.observe(engine.trace[-1])
        assert state.queue_head == queue_of(engine)[:6]
        going_on = {lane.share.request_id: lane for lane in state.lanes if lane is not None and not lane.ended}
        assert set(going_on) == {r.request_id for r in scheduler.running}
        for request in scheduler.running:
            assert going_on[request.request_id].share.num_output == request.num_output_tokens
        assert (state.num_waiting, state.num_running) == (scheduler.num_waiting, len(scheduler.running))
        assert len(state.lanes) <= scheduler.max_num_running_reqs
        ended += len(engine.trace[-1].finished)
        assert state.num_finished == ended
        if not engine.has_unfinished_requests():
            break
    assert state.num_finished == sum(r.status.finish_reason != "abort" for r in live.values())


def test_a_request_keeps_its_lane_and_the_next_one_takes_it():
    engine = engine_with([(4, 2), (4, 6), (4, 6), (4, 6)], seqs=2)
    state = state_of(engine)
    lanes = []
    while engine.has_unfinished_requests():
        engine.step()
        state.observe(engine.trace[-1])
        lanes.append([lane and (lane.share.request_id, lane.state) for lane in state.lanes])
    prefill, decode, done = "prefill", "decode", "done: length"
    assert lanes[:4] == [
        [("0", prefill), ("1", prefill)],
        [("0", done), ("1", decode)],
        [("2", prefill), ("1", decode)],
        [("2", decode), ("1", decode)],
    ]
    assert lanes[5] == [("2", decode), ("1", done)] and lanes[6] == [("2", decode), ("3", prefill)]


def test_a_decode_that_makes_room_for_a_long_prompt_is_shown_as_skipped():
    engine = engine_with([(4, 6), (24, 2)], seqs=2)
    state = state_of(engine)
    for _ in range(2):
        engine.step()
        state.observe(engine.trace[-1])
    assert row_of(drawn(LiveView(state), 80), "0")[:2] == ["0", "skipped"]
    assert row_of(drawn(LiveView(state), 80), "1")[:2] == ["1", "prefill"]


# --- what is drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 40])
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_wider_than_the_console_and_numbers_are_right(width, policy):
    sizes = [(5 + 7 * (i * 5 % 3), 2 + 3 * (i % 3)) for i in range(9)]
    engine = engine_with(sizes, policy)
    state = state_of(engine, {str(i): f"{TITLE} {i}" for i in range(len(sizes))})
    heights, generated, finished = set(), dict.fromkeys(map(str, range(len(sizes))), 0), 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        state.observe(engine.trace[-1])
        lines = drawn(LiveView(state), width)
        assert {cell_len(line) for line in lines} == {width}
        assert not any("\x1b" in line for line in lines)
        heights.add(len(lines))
        if width == 40:
            continue
        for output in outputs:
            generated[output.request_id] = count = len(output.outputs[0].token_ids)
            most = sizes[int(output.request_id)][1]
            row = row_of(lines, output.request_id)
            assert f"{count} of {most}" in " ".join(row), lines
            bar = next(cell for cell in row if set(cell) <= set("█░"))
            assert (bar.count("█") == len(bar)) == (count == most)
            finished += output.finished
        assert f"{finished} of 9 finished, {sum(generated.values())} tokens" in lines[1]
        assert f"{len(queue_of(engine))} waiting" in lines[1]
        highest = max(sum(tokens) for tokens in state.history)
        assert lines[3].rstrip("│ ").endswith(f"at most {highest:2}")
        step = engine.trace[-1]
        prefill = sum(sizes[int(o.request_id)][0] for o in outputs if len(o.outputs[0].token_ids) == 1)
        decode = sum(len(o.outputs[0].token_ids) > 1 for o in outputs)
        assert f"▓ {prefill:2} prefill, █ {decode:2} decode, of 24" in lines[2]
        assert f"{step.kv.used:3} used of ▒ {step.kv.reserved:3} reserved of 256" in lines[4]
        words = lines[5].strip("│ ").removeprefix("queue").split(";")[0].split(", ")
        waiting = queue_of(engine)
        assert [word.split()[0] for word in words if word.split()[0] != "none"] == waiting[:6]
        assert (f" and {len(waiting) - 6} more" in lines[5]) == (len(waiting) > 6)
    assert len(heights) == 1, "the view jumps"


def test_titles_are_text_whatever_they_hold():
    engine = engine_with([(4, 2)])
    state = state_of(engine, {"0": TITLE})
    engine.step()
    state.observe(engine.trace[-1])
    text = "\n".join(drawn(LiveView(state), 200))
    assert "连续批处理 [bold]is[/] a queue [31mwith a decision" in text


def test_rows_beyond_the_screen_are_counted():
    engine = engine_with([(2, 4)] * 8, seqs=8)
    state = state_of(engine)
    engine.step()
    state.observe(engine.trace[-1])
    lines = drawn(LiveView(state, rows=3), 80)
    assert "and 5 more" in lines[-2] and len(lines) == len(drawn(LiveView(state, rows=8), 80)) - 4


def share(
    request_id: str, scheduled: int, prompt: int, computed: int, output: int, length: int = 6, cached: int = 0
) -> RequestStep:
    """A share of a request whose prompt has `length` tokens."""
    sampled = int(output > 0)
    return RequestStep(request_id, scheduled, prompt, cached, computed, output, sampled, "RUNNING", length, 10)


def step_of(number: int, shares: list[RequestStep], **changes: object) -> StepTrace:
    phases = dict.fromkeys(("schedule", "prepare", "forward", "sample", "update"), (0.0, 0.0))
    return StepTrace(number, phases, shares, 0, len(shares), 32, 1, 0, KVUsage(100, 60, 40), **changes)  # type: ignore[arg-type]


def test_a_prompt_in_chunks_shows_how_far_it_is_and_what_a_cache_gave():
    """What a later milestone records: chunks of a prompt, and tokens that were found computed."""
    state = LiveState(2, max_running=2)
    state.observe(step_of(0, [share("a", 16, 16, 24, 0, 40, cached=8)]))
    row = row_of(drawn(LiveView(state), 80), "a")
    assert " ".join(row[1:8]) == "chunk of 16 24 of 40, 8" and row[8] == "cached"
    bar = row[9]
    assert set(bar) == {"▓", "░"} and bar.count("▓") == 24 * len(bar) // 40
    state.observe(step_of(1, [share("a", 16, 16, 40, 1, 40), share("b", 6, 6, 6, 1)]))
    lines = drawn(LiveView(state), 80)
    assert row_of(lines, "a")[1:5] == ["prefill", "40,", "8", "cached"] and row_of(lines, "b")[1:3] == ["prefill", "6"]
    assert "▓ 22 prefill, █  0 decode, of 32" in lines[2]


def test_a_preempted_request_leaves_its_lane_and_computes_its_output_again_when_it_is_back():
    state = LiveState(3, max_running=2)
    state.observe(step_of(0, [share("a", 6, 6, 6, 1), share("b", 6, 6, 6, 1)]))
    state.observe(step_of(1, [share("a", 1, 0, 7, 2)], preempted=["b"], next_in_line=["b", "c"]))
    assert state.queue_head == ["b", "c"] and state.preempted == ["b"]
    assert [lane and lane.share.request_id for lane in state.lanes] == ["a", None]
    state.observe(step_of(2, [share("a", 1, 0, 8, 3), share("b", 7, 6, 7, 2)]))
    assert state.preempted == [] and state.stats.preemptions == 1
    assert [lane and lane.state for lane in state.lanes] == ["decode", "recompute"]
    state.observe(step_of(3, [share("a", 1, 0, 9, 4)], preempted=["b"]))
    state.observe(step_of(4, [share("a", 1, 0, 10, 5)], aborted=["b"]))
    assert state.preempted == []


def test_preempted_requests_stand_in_the_order_in_which_they_run_again():
    state = LiveState(4, max_running=4)
    state.observe(step_of(0, [share(i, 6, 6, 6, 1) for i in "abcd"]))
    state.observe(step_of(1, [share(i, 1, 0, 7, 2) for i in "ab"], preempted=["d", "c"], next_in_line=["c", "d"]))
    assert state.preempted == ["c", "d"]
    state.observe(step_of(2, [share("a", 1, 0, 8, 3)], preempted=["b"], next_in_line=["b", "c", "d"]))
    assert state.preempted == state.queue_head


@given(
    parts=st.lists(st.integers(0, 500), min_size=1, max_size=3),
    rest=st.integers(0, 500),
    width=st.integers(3, 200),
)
def test_a_bar_shows_every_amount_and_is_full_only_at_the_total(parts, rest, width):
    bar = Bar([(part, "decode") for part in parts], sum(parts) + rest)
    cells = bar.widths(width)
    assert sum(cells) <= width and all(bool(cell) == bool(part) for cell, part in zip(cells, parts, strict=True))
    if not rest and sum(parts):
        assert sum(cells) == width
    if rest and width > 4 * len(parts) * (sum(parts) + rest) / rest:
        assert sum(cells) < width
    for cell, part in zip(cells, parts, strict=True):  # in proportion, to a cell for each edge and each lifted part
        assert abs(cell - width * part / max(1, sum(parts) + rest)) <= 1 + len(parts)


def test_a_sparkline_ends_with_the_newest_step_and_keeps_its_scale():
    (line,) = drawn(Sparkline([(80, 0), (0, 1), (16, 0), (0, 0), (0, 8), (0, 4)]), 8)
    assert line == "  █▁▂ ▁▁"
    (line,) = drawn(Sparkline([(80, 0), (0, 1), (16, 0), (0, 0), (0, 8), (0, 4)]), 4)
    assert line == "▂ ▁▁"


# --- the terminals ----------------------------------------------------------------------------------------


def capture(**options: object) -> tuple[Console, Callable[[], str]]:
    raw = io.BytesIO()
    encoding = str(options.pop("encoding", "utf-8"))
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(file=file, width=80, height=30, legacy_windows=False, **{"_environ": {}, **options})  # type: ignore[arg-type]

    def text() -> str:
        file.flush()
        return raw.getvalue().decode(encoding)

    return console, text


SIZES = [(5, 4), (9, 2), (3, 6), (8, 3), (2, 2)]


@pytest.mark.parametrize(
    "options",
    [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}, {"encoding": "ascii"}],
    ids=["pipe", "dumb", "ascii pipe"],
)
def test_a_console_that_cannot_redraw_gets_plain_lines(options):
    engine = engine_with(SIZES)
    console, text = capture(**options)
    assert not can_redraw(console)
    outputs = watch(console, engine, list("01234"), {"0": TITLE}, pace=5.0)  # which nothing here waits for
    for i, (output, (prompt, most)) in enumerate(zip(outputs, SIZES, strict=True)):
        expected, _ = mock_tokens([1 + i] * prompt, SamplingParams(max_tokens=most, ignore_eos=True))
        assert (output.request_id, output.outputs[0].token_ids) == (str(i), expected)
    lines = text().splitlines()
    assert 2 <= len(lines) <= 10 and all(line.isprintable() for line in lines)
    assert lines[-1].endswith("0 waiting, 5 of 5 finished, 17 tokens")
    check_empty(engine)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_shows_every_step_and_is_left_in_order(encoding, colour):
    engine = engine_with(SIZES)
    environ = {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
    console, text = capture(force_terminal=True, encoding=encoding, _environ=environ)
    watch(console, engine, list("01234"), {"0": TITLE}, pace=0.001)
    shown = text()
    assert all(f" step {number} " in shown for number in range(len(engine.trace)))
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert ("\x1b[33m" in shown) == colour  # decode
    assert "Each step was shown for at least 0.001 s" in shown
    last = Text.from_ansi(shown[shown.rindex(f" step {len(engine.trace) - 1} ") :]).plain
    assert "5 of 5 finished, 17 tokens" in last
    check_empty(engine)


def test_at_full_speed_the_last_step_is_still_shown():
    engine = engine_with(SIZES)
    console, text = capture(force_terminal=True, _environ={"TERM": "xterm"})
    watch(console, engine, list("01234"))
    assert f" step {len(engine.trace) - 1} " in text() and "Each step stayed" not in text()


class Interrupted(MockRunner):
    """Ctrl-C in the third step."""

    def execute_model(self, step: SchedulerOutput):
        if len(self.steps) == 2 and step.scheduled:
            self.steps.append(step)
            raise KeyboardInterrupt
        return super().execute_model(step)


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_leaves_no_request_and_a_terminal_in_order(terminal):
    engine = engine_with(SIZES)
    engine.core.runner = Interrupted()
    console, text = capture(force_terminal=terminal, _environ={"TERM": "xterm"})
    with pytest.raises(KeyboardInterrupt):
        watch(console, engine, list("01234"))
    assert not engine.has_unfinished_requests() or [o.finished for o in engine.step()] == [True] * 5
    check_empty(engine)
    if terminal:
        assert text().rindex("\x1b[?25h") > text().rindex("\x1b[?25l")


def test_watching_leaves_other_requests_to_their_owners():
    engine = engine_with(SIZES)
    console, _ = capture()
    outputs = watch(console, engine, ["1", "4"])
    assert [o.request_id for o in outputs] == ["1", "4"] and engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="'9'"):
        watch(console, engine, ["9"])


def test_an_interrupted_watcher_costs_nobody_else_an_output():
    engine = engine_with([(4, 3), (4, 3)], seqs=2)

    def interrupt(step: StepTrace) -> None:
        if step.finished:
            raise KeyboardInterrupt

    engine.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.run_to_completion(["0"])
    (other,) = engine.step()  # completed in the very step that was interrupted
    assert other.request_id == "1" and len(other.outputs[0].token_ids) == 3
    assert not engine.has_unfinished_requests()


def test_a_watcher_sees_each_step_once_and_is_not_told_of_none():
    engine = engine_with([(4, 3), (4, 1)], seqs=2)
    seen: list[int] = []
    engine.on_step = lambda step: seen.append(step.step)
    engine.run_to_completion(["0"])
    assert seen == [0, 1, 2] == [step.step for step in engine.trace]
    assert [o.request_id for o in engine.step()] == ["1"] and engine.step() == []
    assert seen == [0, 1, 2]


def test_a_trace_without_room_is_refused_and_stops_no_engine():
    engine = engine_with([(4, 3)])
    engine.core.recorder.trace = Trace(0)
    engine.on_step = lambda step: pytest.fail("there is no record")
    assert engine.run_to_completion(["0"])["0"].finished
    with pytest.raises(ValueError, match="max_trace_steps=0"):
        config = replace(engine.config, max_trace_steps=0)
        engine.config = config
        watch(capture()[0], engine, [])


# --- the tables -------------------------------------------------------------------------------------------


def cells_of(table: RenderableType, width: int = 80) -> list[list[str]]:
    """The rows under the rule."""
    lines = drawn(table, width)
    rule = next(i for i, line in enumerate(lines) if "──" in line)
    return [line.split() for line in lines[rule + 1 :] if line.strip()]


def test_the_step_table_sums_up_to_the_statistics():
    engine = engine_with([(6, 4), (3, 9), (8, 2), (5, 5), (9, 3)], seqs=2)
    while engine.has_unfinished_requests():
        engine.step()
    rows = cells_of(step_table(engine.trace))
    steps = prompt_tokens = decode_tokens = 0
    for row in rows:
        first, _, last = row[0].partition("-")
        count = int(last or first) - int(first) + 1
        assert int(first) == steps, "steps are missing"
        steps += count
        prompt_tokens += count * int(row[2])
        decode_tokens += count * int(row[3])
    assert steps == engine.stats.steps and len(rows) < steps
    assert prompt_tokens == engine.stats.prompt_tokens_computed == 31
    assert decode_tokens == engine.stats.generated_tokens - 5
    assert max(int(row[1]) for row in rows) == engine.stats.max_running == 2


def test_a_long_step_table_leaves_out_its_middle_and_says_which_steps():
    engine = engine_with([(2, 2 + i % 5) for i in range(30)], seqs=3)
    while engine.has_unfinished_requests():
        engine.step()
    rows = cells_of(step_table(engine.trace, most=8))
    assert len(rows) == 9 and rows[6][1] == "..." and [row[0] for row in rows[:2]] == ["0", "1"]
    gap = next(i for i, row in enumerate(rows) if row[1] == "...")
    first, last = map(int, rows[gap][0].split("-"))
    assert int(rows[gap - 1][0].split("-")[-1]) == first - 1 and int(rows[gap + 1][0].split("-")[0]) == last + 1
    assert int(rows[-1][0].split("-")[-1]) == engine.stats.steps - 1


def test_the_tables_fit_on_80_columns():
    engine = engine_with([(6, 9)] * 12, seqs=3)
    outputs = [output for _ in range(200) if engine.has_unfinished_requests() for output in engine.step()]
    outputs = [output for output in outputs if output.finished]
    stats = engine.stats
    stats.padding_tokens, stats.padding_kv_tokens, stats.prompt_tokens_computed = 123_456, 12_345_678, 1_234_567
    for table in (request_table(outputs), step_table(engine.trace), phase_table(engine.trace), stats_table(stats)):
        lines = drawn(table, 80)
        assert not any("…" in line for line in lines)
        assert max(map(cell_len, lines)) <= 80
    (masked,) = [line for line in drawn(stats_table(stats), 80) if "masked" in line]
    assert masked.split() == ["masked", "K/V", "columns", "12,345,678"]
