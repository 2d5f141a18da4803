"""Traces in results files, as the engine's own objects: what figures of steps are drawn from."""

from __future__ import annotations

from typing import Any

from claims import chapter_2
from claims.ledger import result

from folovllm.engine.trace import RequestStep, StepTrace
from folovllm.kv_cache.interface import BlockSnapshot, KVUsage
from folovllm.outputs import RequestMetrics, RequestOutput


def steps_of(data: dict[str, Any]) -> list[StepTrace]:
    """The steps of a trace in a results file, as the engine's own objects."""
    return [
        StepTrace(
            **step
            | {
                "phases": {name: tuple(span) for name, span in step["phases"].items()},
                "requests": [RequestStep(**share) for share in step["requests"]],
                "kv": KVUsage(**step["kv"]),
                "blocks": snapshot(step["blocks"]) if step.get("blocks") else None,
            }
        )
        for step in data["steps"]
    ]


def snapshot(data: dict[str, Any]) -> BlockSnapshot:
    """The state of a pool; the tables of requests keep their order."""
    tables, host_tables = (
        {request_id: tuple(blocks) for request_id, blocks in data[name].items()} for name in ("tables", "host_tables")
    )
    return BlockSnapshot(
        data["block_size"],
        tables,
        host_tables,
        tuple(data["ref_cnt"]),
        tuple(data["filled"]),
        data["num_free"],
        tuple(data.get("free", ())),
        {int(block): parent for block, parent in data.get("cached", {}).items()},
    )


def traced_requests() -> tuple[list[StepTrace], list[RequestOutput]]:
    """The trace of three questions that `python -m folovllm.course.measure engine` recorded."""
    data = result(chapter_2.TINY)["trace"]
    outputs = [
        RequestOutput(
            output["request_id"],
            None,
            [],
            [],
            True,
            RequestMetrics(
                output["arrival_time"], output["first_scheduled_time"], output["finished_time"], output["token_times"]
            ),
        )
        for output in data["outputs"]
    ]
    return steps_of(data), outputs
