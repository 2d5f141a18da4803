"""Tables for the terminal, from outputs and traces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from rich.table import Table

from folovllm.engine.trace import PHASES, EngineStats, StepTrace
from folovllm.outputs import RequestOutput

SHOWN_STATS = (
    ("steps", "steps"),
    ("forwards", "forward passes"),
    ("prompt_tokens_computed", "prompt tokens computed"),
    ("cached_tokens", "prompt tokens from a cache"),
    ("generated_tokens", "tokens generated"),
    ("padding_tokens", "padding tokens"),
    ("max_running", "most requests in a step"),
)


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds with three digits that matter; a dash for None."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def request_table(outputs: Sequence[RequestOutput]) -> Table:
    """One row per request: how much went in and came out, how it ended, and its latencies.

    TTFT: arrival to first token, waiting included. TPOT: mean time per token after the first.
    """
    table = Table(title="Requests", title_justify="left")
    table.add_column("id", justify="right")
    for name in ("prompt", "output"):
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
    """Where the time of a step goes: mean milliseconds of each phase and its share, prefill and decode apart."""
    table = Table(title="Time in a step", title_justify="left")
    table.add_column("steps")
    table.add_column("count", justify="right")
    for phase in PHASES:
        table.add_column(f"{phase}\nms", justify="right")
    table.add_column("outside of\nthe forward", justify="right")
    all_steps = list(steps)
    for name, group in (
        ("with a prefill", [s for s in all_steps if s.num_prefills]),
        ("decode only", [s for s in all_steps if not s.num_prefills]),
    ):
        if not group:
            continue
        means = {phase: fmean(s.phases[phase][1] - s.phases[phase][0] for s in group) for phase in PHASES}
        outside = 1 - means["forward"] / fmean(s.duration for s in group)
        table.add_row(name, str(len(group)), *(milliseconds(means[p]) for p in PHASES), f"{outside:.1%}")
    return table


def stats_table(stats: EngineStats) -> Table:
    """The engine's counts, one row each; those that are 0 are left out."""
    table = Table(title="Engine", title_justify="left", show_header=False)
    table.add_column("count")
    table.add_column("value", justify="right")
    for name, label in SHOWN_STATS:
        value = getattr(stats, name)
        if value:
            table.add_row(label, f"{value:,}")
    return table
