"""The figures of chapter 3."""

from __future__ import annotations

from claims import chapter_3
from claims.ledger import result
from matplotlib.figure import Figure
from traces import steps_of

from folovllm.course.viz import batching
from folovllm.course.viz.padding import (
    batch_rectangle,
    kv_cells_of_static,
    kv_cells_of_trace,
    padding_map,
    padding_over_steps,
)


def draw_batch_gantt() -> Figure:
    """The same requests arriving over time, in static, dynamic and continuous batches."""
    ways = result(chapter_3.TINY)["trace"]["poisson"]["lives"]
    return batching.batch_gantt({name: [batching.Life(**life) for life in lives] for name, lives in ways.items()})


def served() -> tuple[list[int], list[int]]:
    """Prompt and output lengths of the requests that were served on folo-tiny."""
    requests = result(chapter_3.TINY)["requests"]
    return [prompt for prompt, _ in requests], [output for _, output in requests]


def draw_padding_map() -> Figure:
    """The first four of these as a rectangle, and what becomes of it in a static batch."""
    prompts, outputs = (lengths[: chapter_3.SEATS] for lengths in served())
    return padding_map(
        {
            "prefill": batch_rectangle(prompts),
            "static batch, last step": batch_rectangle(prompts, outputs, max(outputs) - 1),
        }
    )


def draw_padding_over_steps() -> Figure:
    """K/V in the batch of each step, static and continuous."""
    trace = steps_of(result(chapter_3.TINY)["trace"]["continuous"])
    seats = chapter_3.SEATS
    return padding_over_steps(
        {
            f"static, batches of {seats}": kv_cells_of_static(*served(), seats),
            f"M2, {seats} seats": kv_cells_of_trace(trace),
        }
    )


def draw_ratios() -> Figure:
    """Every system of w2 over M1."""
    systems = result(chapter_3.W2)["summary"]["w2"]
    return batching.ratio_bars({name: numbers["ratio_to_base"] for name, numbers in systems.items() if name != "m1"})


def draw_throughput() -> Figure:
    """Tokens per second over the number of seats on folo-tiny."""
    arms = result(chapter_3.TINY)["summary"]["arms"]
    speeds = {arm: numbers["output_tokens_per_s"] for arm, numbers in arms.items()}
    names = {"M2 padded": "m2-padded-", "M2 loop": "m2-loop-", "static batches": "static-"}
    series = {
        name: {int(arm.removeprefix(start)): speeds[arm] for arm in speeds if arm.startswith(start)}
        for name, start in names.items()
    }
    return batching.throughput_by_batch(series, base=("M1", speeds["m1"]))


def draw_waits() -> Figure:
    """Steps that each request waited, under each policy."""
    policies = result(chapter_3.TINY)["policies"]
    urgent = policies["priorities"]
    labels = [f"{i}{', urgent' * (priority == 0)}" for i, priority in enumerate(urgent)]
    waits = {name: policies[name]["waited_steps"] for name in policies if name != "priorities"}
    return batching.waiting_times(waits, labels, "steps")


def draw_queue_depth() -> Figure:
    """Requests that wait and that run in each step, under each policy."""
    policies = result(chapter_3.TINY)["policies"]
    return batching.queue_depth({name: policies[name]["waiting_running"] for name in policies if name != "priorities"})


def draw_starvation() -> Figure:
    """A long request while short ones keep coming."""
    data = dict(result(chapter_3.TINY)["starvation"])
    stream = data.pop("short_requests")
    return batching.starvation(stream, data)


FIGURES = {
    "batch-gantt": draw_batch_gantt,
    "padding-map": draw_padding_map,
    "padding-over-steps": draw_padding_over_steps,
    "ratio-bars": draw_ratios,
    "throughput-by-batch": draw_throughput,
    "waiting-times": draw_waits,
    "queue-depth": draw_queue_depth,
    "starvation": draw_starvation,
}
