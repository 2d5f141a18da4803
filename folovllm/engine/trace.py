"""A record of each step, and the sums over all steps.

Every figure, table and live view of the course is drawn from these records, never from a second implementation.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from folovllm.kv_cache.interface import BlockCopy, BlockSnapshot, KVOp, KVUsage, SwapIn, SwapOut
from folovllm.messages import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from folovllm.request import Request, RequestStatus
from folovllm.scheduler.scheduler import Scheduler

MAX_QUEUE = 6  # waiting ids that a record keeps
MAX_QUEUE_WITH_BLOCKS = 64  # the same, with block snapshots
PHASES = ("schedule", "prepare", "forward", "sample", "update")


@dataclass(frozen=True)
class RequestStep:
    """One request's share of one step."""

    request_id: str
    num_scheduled: int  # tokens computed in this step
    num_prompt: int  # those of them that are prompt tokens
    num_cached: int  # prompt tokens found in the prefix cache, if the request was admitted in this step
    num_computed: int  # tokens with K/V, after the step
    num_output: int  # output tokens, after the step
    num_sampled: int  # output tokens of this step
    status: str  # name of the `RequestStatus` after the step
    prompt_len: int = 0
    max_output: int = 0  # the most output tokens that the request may have
    sampled_ids: tuple[int, ...] = ()  # the output tokens of this step

    @classmethod
    def of(cls, share: ScheduledRequest, request: Request, sampled: Sequence[int], admitted: bool) -> RequestStep:
        """The record of a share. request: its state after the step. admitted: whether this was its first step."""
        return cls(
            request.request_id,
            share.num_tokens,
            max(0, min(share.start + share.num_tokens, request.num_prompt_tokens) - share.start),
            request.num_cached_tokens if admitted else 0,
            request.num_computed_tokens,
            request.num_output_tokens,
            len(sampled),
            request.status.name,
            request.num_prompt_tokens,
            request.max_output_tokens,
            tuple(sampled),
        )


@dataclass(frozen=True)
class StepTrace:
    """One step of the engine."""

    step: int
    # (start, end) of each phase in `PHASES`, in seconds on the engine's clock. On a GPU the forward is asynchronous:
    # its time is part of "sample", which waits for the result.
    phases: dict[str, tuple[float, float]]
    requests: list[RequestStep]
    num_waiting: int  # after the step
    num_running: int  # after the step
    token_budget: int
    forwards: int
    padding_tokens: int  # as in `ModelRunnerOutput`
    kv: KVUsage  # after the step
    kv_ops: list[KVOp] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)  # ids, in this step
    preempted: list[str] = field(default_factory=list)  # ids, in this step
    aborted: list[str] = field(default_factory=list)  # ids of requests aborted since the previous step
    padding_kv_tokens: int = 0  # as in `ModelRunnerOutput`
    # The first ids of the queue after the step. Samples that wait for their shared prompt are not queued yet.
    next_in_line: list[str] = field(default_factory=list)
    blocks: BlockSnapshot | None = None  # the pool after the step, with trace_blocks
    prompts: dict[str, list[int]] = field(default_factory=dict)  # id -> prompt of each request in its first step

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(r.num_scheduled for r in self.requests)

    @property
    def num_prefills(self) -> int:
        """Requests with prompt tokens in this step."""
        return sum(r.num_prompt > 0 for r in self.requests)

    @property
    def duration(self) -> float:
        """Seconds from the start of scheduling to the end of the update."""
        return self.phases["update"][1] - self.phases["schedule"][0]


@dataclass
class EngineStats:
    """Sums over all steps since the start or `reset`."""

    steps: int = 0
    forwards: int = 0
    prompt_tokens_computed: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    padding_tokens: int = 0
    padding_kv_tokens: int = 0
    prefill_chunks: int = 0
    preemptions: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    copied_blocks: int = 0
    max_running: int = 0  # the most requests in a step

    @property
    def hit_rate(self) -> float | None:
        """The share of prompt tokens found in the prefix cache; None before the first prompt.

        Prompt tokens recomputed after a preemption count as not found.
        """
        total = self.cached_tokens + self.prompt_tokens_computed
        return self.cached_tokens / total if total else None

    def add(self, step: StepTrace) -> None:
        """Count a step."""
        self.steps += 1
        self.forwards += step.forwards
        self.padding_tokens += step.padding_tokens
        self.padding_kv_tokens += step.padding_kv_tokens
        self.preemptions += len(step.preempted)
        self.copied_blocks += sum(isinstance(op, BlockCopy) for op in step.kv_ops)
        self.swapped_out_blocks += sum(isinstance(op, SwapOut) for op in step.kv_ops)
        self.swapped_in_blocks += sum(isinstance(op, SwapIn) for op in step.kv_ops)
        self.max_running = max(self.max_running, len(step.requests))
        for request in step.requests:
            self.prompt_tokens_computed += request.num_prompt
            self.generated_tokens += request.num_sampled
            self.cached_tokens += request.num_cached
            self.prefill_chunks += request.num_prompt > 0

    def reset(self) -> None:
        """Set all counts to 0."""
        self.__dict__.update(EngineStats().__dict__)


class Trace:
    """The last `limit` steps, oldest first. `dropped` counts the steps before them."""

    def __init__(self, limit: int) -> None:
        self._steps: deque[StepTrace] = deque(maxlen=limit)
        self.dropped = 0

    def append(self, step: StepTrace) -> None:
        """Add a step. Drops the oldest if full."""
        self.dropped += len(self._steps) == self._steps.maxlen
        self._steps.append(step)

    def amend_last(self, **changes: Any) -> None:
        """Replace fields of the newest step, if it was kept."""
        if self._steps:
            self._steps[-1] = replace(self._steps[-1], **changes)

    def clear(self) -> None:
        """Drop all steps, and do not count them as dropped."""
        self._steps.clear()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepTrace]:
        return iter(self._steps)

    def __getitem__(self, index: int) -> StepTrace:
        return self._steps[index]

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"dropped": n, "steps": [...]}, with the fields of `StepTrace`."""
        return {"dropped": self.dropped, "steps": [asdict(step) for step in self._steps]}

    def to_chrome_trace(self) -> dict[str, Any]:
        """Trace events for Perfetto and chrome://tracing: a track of phases, one per request, two counters."""
        if not self._steps:
            return {"traceEvents": [], "displayTimeUnit": "ms"}
        zero = self._steps[0].phases["schedule"][0]
        tracks: dict[str, int] = {}
        events = [_name("process_name", 0, "folovllm"), _name("thread_name", 0, "engine step")]
        for step in self._steps:
            for phase, (start, end) in step.phases.items():
                events.append(_span(phase, 0, start - zero, end - start, {"step": step.step}))
            start = step.phases["schedule"][0]
            for request in step.requests:
                if request.request_id not in tracks:
                    tracks[request.request_id] = len(tracks) + 1
                    events.append(_name("thread_name", len(tracks), f"request {request.request_id}"))
                kind = "prefill" if request.num_prompt else "decode"
                events.append(_span(kind, tracks[request.request_id], start - zero, step.duration, asdict(request)))
            for name, value in (("scheduled tokens", step.num_scheduled_tokens), ("running", len(step.requests))):
                events.append({"ph": "C", "name": name, "pid": 1, "ts": (start - zero) * 1e6, "args": {name: value}})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path, chrome: bool = False) -> Path:
        """Write JSON to `path`: our own records, or Chrome trace events."""
        path = Path(path)
        path.write_text(json.dumps(self.to_chrome_trace() if chrome else self.to_json()))
        return path


class StepRecorder:
    """Writes the record of each step, from the outputs of the scheduler and the runner."""

    def __init__(self, scheduler: Scheduler, max_steps: int, trace_blocks: bool) -> None:
        self.scheduler = scheduler
        self.trace = Trace(max_steps)
        self.trace_blocks = trace_blocks
        self.stats = EngineStats()
        self.aborted: list[str] = []  # ids, since the last record

    def record(
        self,
        step: SchedulerOutput,
        result: ModelRunnerOutput,
        requests: Sequence[Request],
        phases: dict[str, tuple[float, float]],
    ) -> None:
        """Add the step's record. requests: those of `step.scheduled`, in their state after the step."""
        admitted = {new.request_id for new in step.scheduled_new_reqs}
        trace = StepTrace(
            step=self.stats.steps,
            phases=phases,
            requests=[
                RequestStep.of(share, request, sampled, request.request_id in admitted)
                for share, request, sampled in zip(step.scheduled, requests, result.sampled_token_ids, strict=True)
            ],
            token_budget=self.scheduler.max_num_batched_tokens,
            forwards=result.forwards,
            padding_tokens=result.padding_tokens,
            padding_kv_tokens=result.padding_kv_tokens,
            kv_ops=step.kv_ops,
            finished=[request.request_id for request in requests if request.is_finished],
            preempted=step.preempted_req_ids,
            aborted=self.aborted,
            prompts={new.request_id: new.prompt_token_ids for new in step.scheduled_new_reqs},
            **self._state(),
        )
        self.aborted = []
        self.stats.add(trace)
        self.trace.append(trace)

    def record_stopped(self, request_ids: Iterable[str]) -> None:
        """Mark these requests, which a stop string ended, as finished in the newest step."""
        stopped = set(request_ids)
        if not self.trace or not stopped:
            return
        last = self.trace[-1]
        status = RequestStatus.FINISHED_STOPPED.name
        finished = stopped | set(last.finished)
        self.trace.amend_last(
            requests=[replace(r, status=status) if r.request_id in stopped else r for r in last.requests],
            finished=[r.request_id for r in last.requests if r.request_id in finished],
            **self._state(),
        )

    def _state(self) -> dict[str, Any]:
        """The fields of a record that describe the state after the step."""
        scheduler = self.scheduler
        queue = scheduler.waiting.first(MAX_QUEUE_WITH_BLOCKS if self.trace_blocks else MAX_QUEUE)
        return {
            "num_waiting": scheduler.num_waiting,
            "num_running": len(scheduler.running),
            "next_in_line": [request.request_id for request in queue],
            "kv": scheduler.kv.usage(),
            "blocks": scheduler.kv.snapshot() if self.trace_blocks else None,
        }


def _name(kind: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 1, "tid": tid, "args": {"name": name}}


def _span(name: str, tid: int, start: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    """A complete event; Chrome's times are microseconds."""
    return {"ph": "X", "name": name, "pid": 1, "tid": tid, "ts": start * 1e6, "dur": seconds * 1e6, "args": args}
