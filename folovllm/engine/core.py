"""The engine core: one step of the loop, in token ids only (vLLM: `vllm/v1/engine/core.py`).

schedule -> execute (prepare, forward, sample) -> update -> record
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from folovllm.engine.trace import EngineStats, StepRecorder, Trace
from folovllm.messages import EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from folovllm.request import Request, RequestStatus
from folovllm.runner.host_memory import HostHeap
from folovllm.runner.interface import ModelRunner
from folovllm.scheduler.scheduler import Scheduler


class EngineCore:
    """A scheduler, a runner, and the record of their steps. It has no text and no tokenizer."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        max_trace_steps: int = 10_000,
        trace_blocks: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        heap: HostHeap | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self.recorder = StepRecorder(scheduler, max_trace_steps, trace_blocks)
        self.heap = heap  # set last, so that it ends last: after the model and the K/V

    @property
    def trace(self) -> Trace:
        return self.recorder.trace

    @property
    def stats(self) -> EngineStats:
        return self.recorder.stats

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError, with nothing changed, for one that can never run."""
        self.scheduler.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Finish requests before they are complete, and free what they hold."""
        self.recorder.aborted += self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)
        self._settle()

    def stop_requests(self, request_ids: Iterable[str]) -> None:
        """Finish requests whose newest text completed a stop string. This belongs to the step that gave the text."""
        self.recorder.record_stopped(self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_STOPPED))
        self._settle()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished_requests()

    def step(self) -> list[EngineCoreOutput]:
        """Run one step. Without unfinished requests it does nothing and returns [].

        If the runner fails or is interrupted, the requests of this step are aborted before the exception is raised
        again, because their K/V may be half written. Others go on; those that the step preempted compute their K/V
        again.
        """
        if not self.scheduler.has_unfinished_requests():
            return []
        start = self.clock()
        step = self.scheduler.schedule()
        scheduled = self.clock()
        result = self._execute(step)
        executed = self.clock()
        requests = [self.scheduler.requests[share.request_id] for share in step.scheduled]
        for request in requests:
            if request.first_scheduled_time is None:
                request.first_scheduled_time = start
        outputs = self.scheduler.update_from_output(step, result)
        phases = {"schedule": (start, scheduled), **result.phases, "update": (executed, self.clock())}
        self.recorder.record(step, result, requests, phases)
        self._settle()
        return outputs

    def _settle(self) -> None:
        """If no step will follow, tell the runner now which requests have finished."""
        if not self.scheduler.has_unfinished_requests():
            step = self.scheduler.schedule()
            if step.finished_req_ids:
                self._execute(step)

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        try:
            return self.runner.execute_model(step)
        except BaseException:
            self.recorder.aborted += self.scheduler.undo_step(step)
            raise
