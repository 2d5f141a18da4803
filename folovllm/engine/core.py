"""The engine core: one step of the loop, in token ids only (vLLM: `vllm/v1/engine/core.py`).

schedule -> execute (prepare, forward, sample) -> update -> record
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from folovllm.engine.retry import execute_in_parts, is_device_fault, reason_of
from folovllm.engine.trace import EngineStats, StepRecorder, Trace
from folovllm.errors import EngineDeadError
from folovllm.messages import EngineCoreOutput, SchedulerOutput
from folovllm.request import Request, RequestStatus
from folovllm.runner.host_memory import HostHeap
from folovllm.runner.interface import ModelRunner
from folovllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


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
        self.failure: str | None = None  # why the device is lost
        self.recorder = StepRecorder(scheduler, max_trace_steps, trace_blocks)
        self.heap = heap  # set last, so that it ends last: after the model and the K/V

    @property
    def trace(self) -> Trace:
        return self.recorder.trace

    @property
    def stats(self) -> EngineStats:
        return self.recorder.stats

    def check_can_run(self, request: Request) -> None:
        """Raise ValueError for a request that can never run, and EngineDeadError if the device is lost."""
        if self.failure is not None:
            raise EngineDeadError(f"this engine has stopped: {self.failure}; allowed: a new one, in a new process")
        self.scheduler.check_can_run(request)

    def add_request(self, request: Request) -> None:
        """Queue a request that `check_can_run` accepts. Raises ValueError, with nothing changed, for an id in use."""
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

        If the forward fails, it is tried again in parts, and only requests that fail alone end with an error. If the
        device is lost, all requests end with that error, and the engine takes no more.

        Any other exception, and an interrupt, abort the requests of this step before it is raised again, because their
        K/V may be half written. Others go on; those that the step preempted compute their K/V again.
        """
        if not self.scheduler.has_unfinished_requests():
            return []
        start = self.clock()
        step = self.scheduler.schedule()
        try:
            return self._run(step, start)
        except BaseException as error:
            if isinstance(error, Exception) and is_device_fault(error):
                return self._stop(reason_of(error))
            self.recorder.aborted += self.scheduler.undo_step(step)
            raise

    def _run(self, step: SchedulerOutput, start: float) -> list[EngineCoreOutput]:
        scheduled = self.clock()
        self.runner.update_states(step)
        result = execute_in_parts(self.runner, step)
        self.scheduler.recompute(result.unread, step)
        executed = self.clock()
        requests = [self.scheduler.requests[share.request_id] for share in step.scheduled]
        for request in requests:
            if request.first_scheduled_time is None:
                request.first_scheduled_time = start
        outputs = self.scheduler.update_from_output(step, result)
        untimed = dict.fromkeys(("prepare", "forward", "sample"), (executed, executed))
        phases = {"schedule": (start, scheduled), **untimed, **result.phases, "update": (executed, self.clock())}
        self.recorder.record(step, result, requests, phases)
        self._settle()
        return outputs

    def _stop(self, reason: str) -> list[EngineCoreOutput]:
        """The device is lost: all unfinished requests end, and `check_can_run` refuses others."""
        self.failure = reason
        requests = list(self.scheduler.requests.values())
        logger.error("the engine has stopped, and its %d requests end: %s", len(requests), reason)
        for request in requests:
            request.stop_reason = reason
        self.scheduler.finish_requests([r.request_id for r in requests], RequestStatus.FINISHED_ERROR)
        return [EngineCoreOutput.of(request, [], None) for request in requests]

    def _settle(self) -> None:
        """If no step will follow, tell the runner now which requests have finished."""
        if not self.scheduler.has_unfinished_requests():
            step = self.scheduler.schedule()
            if step.finished_req_ids:
                self.runner.update_states(step)
