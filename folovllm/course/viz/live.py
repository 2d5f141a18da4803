"""A live view of the engine in the terminal: which requests wait, which run, and what each step computes.

Give each step of a trace to `LiveState.observe`, then print `LiveView(state)`. `watch` does that while an engine runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from string import Formatter

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from folovllm.checks import check_int
from folovllm.course.viz.live_blocks import level, pool_lines, swatch
from folovllm.course.viz.live_state import Lane, LiveState
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.observing import observing
from folovllm.engine.trace import StepTrace
from folovllm.outputs import RequestOutput

FRAME_SECONDS = 1 / 15  # drawing every step at full speed would take longer than a small model's step
GAP = 2  # blanks between columns
FRAME = 4  # columns around the view
LABEL = 11  # the first column and its gap
LINES_AROUND = 11  # lines of the view besides blocks and running requests, and one spare line

RULES = {"sjf": "; fewest tokens left first", "priority": "; lowest priority first"}

# Kind of cell: its character, its ASCII character, its colour. Shapes differ, so that no kind depends on colour.
CELLS: Mapping[str, tuple[str, str, str]] = {
    "prefill": ("▓", "#", "bright_blue"),
    "decode": ("█", "=", "yellow"),
    "used": ("█", "=", "green"),
    "reserved": ("▒", "-", "green"),
    "none": ("░", ".", "bright_black"),
}


def cell(kind: str, ascii_only: bool) -> str:
    """The character of a kind of cell."""
    return CELLS[kind][ascii_only]


@dataclass(frozen=True)
class Bar:
    """Amounts side by side, each in cells of its kind, out of `total`. The bar is as wide as its column.

    Every amount above 0 gets at least one cell, and the bar is full only when `total` is reached.
    """

    parts: Sequence[tuple[int, str]]
    total: int

    def widths(self, width: int) -> list[int]:
        """Cells of each part in a bar of `width` cells; together at most `width`."""
        cells, amount, edge = [], 0, 0
        for part, _ in self.parts:
            amount += part
            new_edge = width * min(amount, self.total) // max(1, self.total)
            cells.append(max(new_edge - edge, min(1, part)))
            edge = new_edge
        while sum(cells) > width:
            cells[cells.index(max(cells))] -= 1
        return cells

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text, ascii_only = Text(no_wrap=True, end=""), options.ascii_only
        cells = self.widths(options.max_width)
        kinds = [*(kind for _, kind in self.parts), "none"]
        for kind, count in zip(kinds, [*cells, options.max_width - sum(cells)], strict=True):
            text.append(cell(kind, ascii_only) * count, style=CELLS[kind][2])
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


@dataclass(frozen=True)
class Sparkline:
    """Tokens of the newest steps as a row of columns, the newest at the right. The largest step has full height."""

    steps: Sequence[tuple[int, int]]  # (prefill, decode) tokens; a step with prefill tokens has their colour

    @property
    def top(self) -> int:
        """Tokens of the largest step."""
        return max((sum(step) for step in self.steps), default=0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.steps[-options.max_width :]
        text = Text(" " * (options.max_width - len(shown)), no_wrap=True, end="")
        for prefill, decode in shown:
            column = level(prefill + decode, self.top, options.ascii_only)
            text.append(column, style=CELLS["prefill" if prefill else "decode"][2])
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


@dataclass(frozen=True)
class Line:
    """Text on one line, cut at the end of the column. {decode} in `legend` is replaced by the cell of that kind."""

    text: str = ""
    legend: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        words = self.text.encode("ascii", "replace").decode() if ascii_only else self.text
        text = Text(words, no_wrap=True, overflow="crop" if ascii_only else "ellipsis", end="")
        for literal, kind, _, _ in Formatter().parse(self.legend):
            text.append(literal)
            if kind is not None:
                text.append(cell(kind, ascii_only), style=CELLS[kind][2])
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = cell_len(self.text) + len(self.legend.format(**dict.fromkeys(CELLS, "x")))
        return Measurement(min(1, width), width).with_maximum(options.max_width)


@dataclass(frozen=True)
class LiveView:
    """The engine after the newest step that `state` observed, in at most `rows` + `LINES_AROUND` lines.

    It adapts to the given width and is readable without colour. Blocks are shown if the trace has snapshots.
    """

    state: LiveState
    rows: int = 16

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = self.state
        width = max(1, options.max_width - FRAME - LABEL)
        pool = pool_lines(state, width, max(1, self.rows // 3), options.ascii_only)
        parts: list[RenderableType] = [
            Line(summary(state)),
            _bars(state),
            Line(f"{'queue':{LABEL}}{queue_line(state)}"),
            *(_labelled(label, line) for label, line in pool),
            "",
            _lanes(state, max(1, self.rows - len(pool))),
        ]
        view = Table.grid(expand=True)
        for part in parts:
            view.add_row(part)
        heading = "before the first step" if state.step is None else f"step {state.step.step}"
        yield Panel(view, title=heading, title_align="left", padding=(0, 1))


def _labelled(label: str, line: Text) -> Text:
    text = Text(f"{label:{LABEL}}", no_wrap=True, overflow="crop")
    return text.append_text(line)


def summary(state: LiveState) -> str:
    """Counts of requests and tokens after the newest step."""
    return (
        f"{state.num_running} of at most {state.max_running} running, {state.num_waiting:,} waiting, "
        f"{state.num_finished:,} of {state.num_requests:,} finished, {state.stats.generated_tokens:,} tokens"
    )


def queue_line(state: LiveState) -> str:
    """The first waiting requests, and the scheduling policy if it is not first come, first served."""
    if not state.num_waiting:
        return "none waiting"
    if state.step is None:
        return f"{state.num_waiting:,} waiting"
    names = state.queue_head
    if not names:
        return f"{state.num_waiting} samples waiting for the prefill of their prompt"
    more = state.num_waiting - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "") + RULES.get(state.policy, "")


def _bars(state: LiveState) -> Table:
    """Tokens of the newest step, tokens of the steps so far, and K/V in use."""
    grid = _grid(min_widths=(LABEL - GAP, None, None), ratios={1: 1})
    step = state.step
    if step is None:
        return grid
    prefill, decode = state.history[-1]
    budget, capacity = f"{step.token_budget:,}", f"{step.kv.capacity:,}"
    # Numbers keep their width from step to step; otherwise the bars would jump.
    steps = Sparkline(list(state.history))
    p, d, top = (f"{n:{len(budget)},}" for n in (prefill, decode, steps.top))
    used, reserved = (f"{n:{len(capacity)},}" for n in (step.kv.used, step.kv.reserved))
    grid.add_row(
        "tokens",
        Bar([(prefill, "prefill"), (decode, "decode")], step.token_budget),
        Line(legend=f"{{prefill}} {p} prefill, {{decode}} {d} decode, of {budget}"),
    )
    grid.add_row("steps", steps, Line(f"tokens per step, at most {top}"))
    grid.add_row(
        "K/V",
        Bar([(step.kv.used, "used"), (step.kv.reserved - step.kv.used, "reserved")], step.kv.capacity),
        Line(legend=f"{{used}} {used} used of {{reserved}} {reserved} reserved of {capacity}"),
    )
    return grid


def _lanes(state: LiveState, rows: int) -> Table:
    """One row per running request: what the newest step computed for it, and its output length."""
    min_widths = [LABEL - GAP, len("done: length"), len("prompt"), None, len("256 of 256"), None]
    table = _grid(min_widths[: 6 if state.titles else 5], ratios={3: 1, 5: 2}, right=(2, 4))
    table.add_row("request", "state", "prompt", "output", style="bold")
    for lane in state.lanes[:rows]:
        table.add_row(*([] if lane is None else _lane(state, lane)))
    if len(state.lanes) > rows:
        hidden = sum(lane is not None for lane in state.lanes[rows:])
        table.add_row("", f"and {hidden} more")
    return table


def _grid(min_widths: Sequence[int | None], ratios: Mapping[int, int], right: Sequence[int] = ()) -> Table:
    """A borderless table whose columns never wrap. Columns with a ratio share the remaining width."""
    grid = Table.grid(expand=True, padding=(0, GAP, 0, 0))
    for column, min_width in enumerate(min_widths):
        justify: JustifyMethod = "right" if column in right else "left"
        ratio = ratios.get(column)
        grid.add_column(no_wrap=True, overflow="crop", min_width=min_width, ratio=ratio, justify=justify)
    return grid


def _lane(state: LiveState, lane: Lane) -> list[RenderableType]:
    """The cells of one row. The bar shows the prompt while it is computed in chunks, otherwise the output."""
    share = lane.share
    prompt, most = share.prompt_len, share.max_output
    computed = f"{prompt}" if share.num_computed >= prompt else f"{share.num_computed} of {prompt}"
    cached = f", {lane.num_cached} cached" if lane.num_cached else ""
    output = Bar([(share.num_output, "decode")], most)
    name = Text(no_wrap=True)
    if share.request_id in state.owners:
        name.append(*swatch(state.owners[share.request_id])).append(" ")
    cells: list[RenderableType] = [
        name.append(share.request_id),
        f"chunk of {share.num_scheduled}" if lane.state == "chunk" else lane.state,
        computed + cached,
        output if share.num_computed >= prompt else Bar([(share.num_computed, "prefill")], prompt),
        f"{share.num_output} of {most}",
    ]
    if state.titles:
        cells.append(Line(state.title(share.request_id)))
    return cells


# ---------------------------------------------------------------------- while an engine runs


def can_redraw(console: Console) -> bool:
    """Whether the console can redraw. A pipe, a file and a dumb terminal cannot."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def display(console: Console, state: LiveState, pace: float = 0.0) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every step. At the end, the last state stays on the screen.

    pace: minimum seconds per step on the screen; with 0, steps faster than `FRAME_SECONDS` are not drawn. A console
    that cannot redraw gets a plain line for each tenth of the requests that has finished.
    """
    if not can_redraw(console):
        yield _reporter(console, state)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        shown = float("-inf")  # time of the last redraw

        def draw() -> None:
            nonlocal shown
            left = shown + (pace or FRAME_SECONDS) - time.perf_counter()
            if left > 0 and not pace:
                return
            time.sleep(max(0.0, left))
            live.update(LiveView(state, console.size.height - LINES_AROUND), refresh=True)
            shown = time.perf_counter()

        draw()
        try:
            yield draw
        finally:
            live.update(LiveView(state, console.size.height - LINES_AROUND))  # leaving shows it


def _reporter(console: Console, state: LiveState) -> Callable[[], None]:
    tenths = 0

    def report() -> None:
        nonlocal tenths
        reached = 10 * state.num_finished // max(1, state.num_requests)
        if reached > tenths and state.step is not None:
            console.print(f"step {state.step.step}: {summary(state)}", markup=False, highlight=False, soft_wrap=True)
        tenths = reached

    return report


def watch(
    console: Console,
    engine: LLMEngine,
    request_ids: Sequence[str],
    titles: Mapping[str, str] | None = None,
    pace: float = 0.0,
) -> list[RequestOutput]:
    """Run queued requests to completion and show every step. Returns the final outputs in the order of `request_ids`.

    titles, pace: as in `LiveState` and `display`. After an interrupt, the terminal is restored and the requests are
    aborted. Raises ValueError for an id that the engine does not have.
    """
    engine.check_live(request_ids)
    with watching(console, engine, titles, pace):
        return list(engine.run_to_completion(request_ids).values())


@contextmanager
def watching(
    console: Console, engine: LLMEngine, titles: Mapping[str, str] | None = None, pace: float = 0.0
) -> Iterator[None]:
    """Show every step of the engine while the body of the `with` runs it.

    The state of every block is recorded for the view. Raises ValueError for an engine that keeps no trace.
    """
    check_int("max_trace_steps", engine.config.max_trace_steps, 1)  # before the screen changes
    scheduler = engine.core.scheduler
    policy = engine.config.scheduler.scheduling_policy
    num_requests = scheduler.num_waiting + len(scheduler.running)
    state = LiveState(num_requests, policy, scheduler.max_num_running_reqs, titles)
    with display(console, state, pace) as show:

        def observe(step: StepTrace) -> None:
            state.observe(step)
            show()

        with observing(engine, observe):
            yield
    if pace and can_redraw(console):
        note = f"Each step was shown for at least {pace:g} s; the latencies include that time.\n"
        console.print(note, highlight=False, soft_wrap=True)
