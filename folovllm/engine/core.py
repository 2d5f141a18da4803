"""The engine core: one step of the loop, in token ids only (vLLM: `vllm/v1/engine/core.py`).

schedule -> execute (prepare, forward, sample) -> update -> record
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from folovllm.engine.trace import EngineStats, RequestStep, StepTrace, Trace
from folovllm.request import Request, RequestStatus
from folovllm.runner.interface import ModelRunner, RunnerOutput
from folovllm.scheduler.output import CoreOutput, SchedulerOutput
from folovllm.scheduler.scheduler import Scheduler

NEXT_IN_LINE = 6  # ids of the queue that a record keeps
LONG_LINE = 64  # and that it keeps beside the state of every block


class EngineCore:
    """A scheduler and a runner, and the record of what they did. Knows no text and no tokenizer."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        max_trace_steps: int = 10_000,
        trace_blocks: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self.trace = Trace(max_trace_steps)
        self.trace_blocks = trace_blocks
        self.stats = EngineStats()
        self._aborted: list[str] = []  # since the last record

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError, with nothing changed, for one that can never run."""
        self.scheduler.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Finish requests from outside, and free what they hold."""
        self._aborted += self.scheduler.abort(request_ids)
        self._settle()

    def stop_requests(self, request_ids: Iterable[str]) -> None:
        """Finish requests whose newest text completed a stop string. That is part of the step that brought the text."""
        stopped = set(self.scheduler.abort(request_ids, RequestStatus.FINISHED_STOPPED))
        if self.trace and stopped:
            last = self.trace[-1]
            status = RequestStatus.FINISHED_STOPPED.name
            finished = stopped | set(last.finished)
            self.trace.amend_last(
                requests=[replace(r, status=status) if r.request_id in stopped else r for r in last.requests],
                finished=[r.request_id for r in last.requests if r.request_id in finished],
                **self._after_step(),
            )
        self._settle()

    def let_go(self, request_ids: Iterable[str]) -> None:
        """Free what finished requests with `hold` kept for forks."""
        self.scheduler.let_go(request_ids)
        self._settle()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished_requests()

    def step(self) -> list[CoreOutput]:
        """Run one step. Without unfinished requests it does nothing and returns [].

        If the runner fails or is interrupted, the requests of this step are aborted before the exception goes on, since
        their K/V may be half written. Other requests are untouched.
        """
        if not self.scheduler.has_unfinished_requests():
            return []
        start = self.clock()
        step = self.scheduler.schedule()
        scheduled = self.clock()
        try:
            result = self.runner.execute(step)
        except BaseException:
            self._aborted += self.scheduler.undo_step(step)
            raise
        executed = self.clock()
        requests = [self.scheduler.requests[share.request_id] for share in step.scheduled]
        admitted = {new.request_id for new in step.new_requests}
        for request in requests:
            if request.first_scheduled_time is None:
                request.first_scheduled_time = start
        outputs = self.scheduler.update(step, result)
        phases = {"schedule": (start, scheduled), **result.phases, "update": (executed, self.clock())}
        self._record(step, result, requests, admitted, phases)
        self._settle()
        return outputs

    def _settle(self) -> None:
        """When nothing is left to run, no later step would tell the runner what to forget: tell it now."""
        if not self.scheduler.has_unfinished_requests() and self.scheduler.has_news_for_runner():
            self.runner.execute(self.scheduler.schedule())

    def _record(
        self,
        step: SchedulerOutput,
        result: RunnerOutput,
        requests: list[Request],
        admitted: set[str],
        phases: dict[str, tuple[float, float]],
    ) -> None:
        shares = []
        for share, request, sampled in zip(step.scheduled, requests, result.sampled_token_ids, strict=True):
            num_prompt = max(0, min(share.start + share.num_tokens, request.num_prompt_tokens) - share.start)
            num_cached = request.num_cached_tokens if request.request_id in admitted else 0
            shares.append(
                RequestStep(
                    request.request_id,
                    share.num_tokens,
                    num_prompt,
                    num_cached,
                    request.num_computed_tokens,
                    request.num_output_tokens,
                    len(sampled),
                    request.status.name,
                    request.num_prompt_tokens,
                    request.max_output_tokens,
                    tuple(sampled),
                )
            )
        trace = StepTrace(
            step=self.stats.steps,
            phases=phases,
            requests=shares,
            token_budget=self.scheduler.max_num_batched_tokens,
            forwards=result.forwards,
            padding_tokens=result.padding_tokens,
            padding_kv_tokens=result.padding_kv_tokens,
            kv_ops=step.kv_ops,
            finished=[r.request_id for r in requests if r.is_finished],
            preempted=step.preempted_ids,
            aborted=self._aborted,
            prompts={new.request_id: new.prompt_token_ids for new in step.new_requests},
            **self._after_step(),
        )
        self._aborted = []
        self.stats.add(trace)
        self.trace.append(trace)

    def _after_step(self) -> dict[str, Any]:
        """The fields of a record that say how things stand."""
        scheduler = self.scheduler
        in_line = scheduler.waiting.first(LONG_LINE if self.trace_blocks else NEXT_IN_LINE)
        return {
            "num_waiting": scheduler.num_waiting,
            "num_running": len(scheduler.running),
            "next_in_line": [request.request_id for request in in_line],
            "kv": scheduler.kv.usage(),
            "blocks": scheduler.kv.snapshot() if self.trace_blocks else None,
        }
