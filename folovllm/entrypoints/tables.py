"""Tables for the terminal, from outputs and traces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean

from rich import box
from rich.table import Table

from folovllm.engine.trace import PHASES, EngineStats, StepTrace
from folovllm.outputs import RequestOutput

SHOWN_STATS = (
    ("steps", "steps"),
    ("forwards", "forward passes"),
    ("prompt_tokens_computed", "prompt tokens computed"),
    ("cached_tokens", "prompt tokens from a cache"),
    ("generated_tokens", "tokens generated"),
    ("padding_tokens", "padding tokens computed"),
    ("padding_kv_tokens", "masked K/V columns"),
    ("copied_blocks", "blocks copied on write"),
    ("preemptions", "preemptions"),
    ("swapped_out_blocks", "blocks swapped to the host"),
    ("swapped_in_blocks", "blocks swapped back"),
    ("max_running", "most requests in a step"),
)


def new_table(title: str, *, head: bool = True, gap: int = 2) -> Table:
    """An empty table without frames, with `gap` blanks (at least 1) between columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), show_header=head)
    table.title_justify, table.title_style = "left", "bold"
    return table


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds with three significant digits; a dash for None."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def request_table(outputs: Sequence[RequestOutput]) -> Table:
    """One row per request: its tokens, finish reason and latencies.

    TTFT: arrival to first token, queueing included. TPOT: mean time per token after the first. The column of cached
    prompt tokens is left out if there are none.
    """
    cached = any(output.num_cached_tokens for output in outputs)
    table = new_table("Requests", gap=1 if cached else 2)
    table.add_column("id", justify="right")
    for name in ("prompt", *(["cached"] if cached else []), "output"):
        table.add_column(f"{name}\ntokens", justify="right")
    table.add_column("finish")
    for name in ("queue", "TTFT", "TPOT", "total"):
        table.add_column(f"{name}\nms", justify="right")
    table.add_column("tokens/s", justify="right")
    for output in outputs:
        metrics = output.metrics
        tokens = sum(len(c.token_ids) for c in output.outputs)
        seconds = metrics.e2e_latency
        served = None if seconds is None else seconds - (metrics.queue_time or 0.0)
        table.add_row(
            output.request_id,
            str(len(output.prompt_token_ids)),
            *([str(output.num_cached_tokens)] if cached else []),
            str(tokens),
            ", ".join(dict.fromkeys(c.finish_reason or "running" for c in output.outputs)),
            milliseconds(metrics.queue_time),
            milliseconds(metrics.ttft),
            milliseconds(metrics.tpot),
            milliseconds(seconds),
            f"{tokens / served:.0f}" if served else "-",
        )
    return table


def phase_table(steps: Iterable[StepTrace]) -> Table:
    """Mean milliseconds of each phase of a step, for steps with prefill and steps without."""
    table = new_table("Time in a step")
    table.add_column("steps")
    table.add_column("count", justify="right")
    for phase in PHASES:
        table.add_column(f"{phase}\nms", justify="right")
    table.add_column("outside of\nthe forward", justify="right")
    all_steps = list(steps)
    for name, group in (
        ("with prefill", [s for s in all_steps if s.num_prefills]),
        ("decode only", [s for s in all_steps if not s.num_prefills]),
    ):
        if not group:
            continue
        means = {phase: fmean(s.phases[phase][1] - s.phases[phase][0] for s in group) for phase in PHASES}
        outside = 1 - means["forward"] / fmean(s.duration for s in group)
        table.add_row(name, str(len(group)), *(milliseconds(means[p]) for p in PHASES), f"{outside:.1%}")
    return table


def step_table(steps: Iterable[StepTrace], most: int = 20) -> Table:
    """The work of each step. Consecutive steps with the same work for the same requests share a row.

    Tokens and forwards are per step, ms is the mean per step. Padding tokens and masked K/V columns are summed over the
    row's steps. K/V, in tokens, is the maximum over them, and waiting requests are those after the last. Of more than
    `most` rows, the middle ones are left out.
    """
    table = new_table("Steps", gap=1)
    table.add_column("steps", justify="right", no_wrap=True)
    for head in (
        "run",
        "prefill\ntokens",
        "decode\ntokens",
        "for-\nwards",
        "padding\ntokens",
        "masked\nK/V",
        "wait",
        "K/V\nreserved",
        "K/V\nused",
        "ms",
    ):
        table.add_column(head, justify="right")
    groups = [list(group) for _, group in groupby(steps, key=_work)]
    tail = most // 4
    middle = range(most - tail, len(groups) - tail) if len(groups) > most else range(0)
    for index, group in enumerate(groups):
        if index not in middle:
            table.add_row(*_step_cells(group))
        elif index == middle.start:
            last = groups[middle.stop - 1][-1]
            table.add_row(f"{group[0].step}-{last.step}", *["..."] * 10)
    return table


def _work(step: StepTrace) -> tuple[tuple[str, int, int], ...]:
    """What steps of one row have in common: the tokens of each request, and its prompt tokens."""
    return tuple((r.request_id, r.num_scheduled, r.num_prompt) for r in step.requests)


def _step_cells(group: Sequence[StepTrace]) -> list[str]:
    """A row of `step_table`."""
    first, last = group[0], group[-1]
    prefill = sum(r.num_prompt for r in first.requests)
    return [
        f"{first.step}" if first is last else f"{first.step}-{last.step}",
        f"{len(first.requests)}",
        f"{prefill}",
        f"{first.num_scheduled_tokens - prefill}",
        f"{first.forwards}",
        f"{sum(s.padding_tokens for s in group)}",
        f"{sum(s.padding_kv_tokens for s in group):,}",
        f"{last.num_waiting}",
        f"{max(s.kv.reserved for s in group):,}",
        f"{max(s.kv.used for s in group):,}",
        milliseconds(fmean(s.duration for s in group)),
    ]


def stats_table(stats: EngineStats) -> Table:
    """The engine's counts, without those that are 0."""
    table = new_table("Engine", head=False)
    table.add_column("count")
    table.add_column("value", justify="right")
    for name, label in SHOWN_STATS:
        value = getattr(stats, name)
        if value:
            table.add_row(label, f"{value:,}")
        if value and name == "cached_tokens":
            table.add_row("share of prompt tokens from a cache", f"{stats.hit_rate:.1%}")
    return table
