"""What the live view knows: the trace of a run, summed up step by step.

Everything that moves is read from `StepTrace` records, so a recorded run can be shown as well as a living one. Of a
request, only what never changes while it waits is read besides: its prompt's length, its limits, its rank in the line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from folovllm.engine.trace import EngineStats, RequestStep, StepTrace
from folovllm.request import Request, RequestStatus
from folovllm.scheduler.request_queue import make_queue

HISTORY = 400  # steps kept for the sparkline: more than a terminal is wide


@dataclass
class Lane:
    """The row of a running request, which it keeps until the step after its last.

    share: its share of the newest step that ran it. state: "prefill", "decode", "skipped" (it runs, and a long prompt
    had the newest step to itself), or "done: " and how it ended.
    """

    request: Request
    share: RequestStep
    state: str

    @property
    def ended(self) -> bool:
        """Whether the row is free from the next step on."""
        return self.state.startswith("done")


class LiveState:
    """All that the view shows: the records so far, summed up.

    requests: those in the engine, in the order in which they came. policy: as the scheduler's. max_running: the most
    that may run at once. titles: a text per request id; the samples of one prompt ("7/0", "7/1") share that of "7".
    """

    def __init__(
        self,
        requests: Iterable[Request],
        policy: str = "fcfs",
        max_running: int = 1,
        titles: Mapping[str, str] | None = None,
    ) -> None:
        self.policy = policy
        self.max_running = max_running
        self.titles = {} if titles is None else dict(titles)
        self.step: StepTrace | None = None  # the newest
        self.stats = EngineStats()
        self.num_finished = 0
        self.lanes: list[Lane | None] = []
        self.history: deque[tuple[int, int]] = deque(maxlen=HISTORY)  # (prefill, decode) tokens of each step
        self._requests: dict[str, Request] = {}
        self._waiting: dict[str, Request] = {}
        self._returned: dict[str, Request] = {}  # they wait ahead of their equals, the last one first
        self._children: dict[str, list[Request]] = {}  # of a leader whose prompt is not computed yet
        self.add(requests)

    def add(self, requests: Iterable[Request]) -> None:
        """Take requests that are new in the engine. Those known already and those finished are passed over."""
        for request in requests:
            if request.request_id in self._requests or request.is_finished:
                continue
            self._requests[request.request_id] = request
            if request.parent_id is None:
                self._waiting[request.request_id] = request
            else:
                self._children.setdefault(request.parent_id, []).append(request)
        room = min(self.max_running, len(self._requests))
        self.lanes += [None] * (room - len(self.lanes))

    @property
    def num_requests(self) -> int:
        """Requests ever seen."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, after the newest step."""
        return self.num_requests if self.step is None else self.step.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that run and go on, after the newest step."""
        return 0 if self.step is None else self.step.num_running

    def next_in_line(self, count: int) -> list[Request]:
        """The next `count` that wait, or as many as there are, in the order of the scheduler's own kind of queue.

        Samples that wait for the prompt they share (see `Scheduler`) are in no line yet.
        """
        line = make_queue(self.policy)
        for request in self._waiting.values():
            line.add(request)
        for request in self._returned.values():
            line.prepend(request)
        return [line.pop() for _ in range(min(count, len(line)))]

    def title(self, request: Request) -> str:
        """The request's text on one line, or ""."""
        request_id = request.request_id
        text = self.titles.get(request_id) or self.titles.get(request_id.rpartition("/")[0], "")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    def observe(self, step: StepTrace) -> None:
        """Take in the next step. Steps come in their order; each of their requests was given to `add` before."""
        self.step = step
        self.stats.add(step)
        prefill = sum(share.num_prompt for share in step.requests)
        self.history.append((prefill, step.num_scheduled_tokens - prefill))
        for request_id in step.aborted:
            self._drop(request_id)
        for request_id in step.preempted:
            self._drop(request_id)
            self._returned[request_id] = self._requests[request_id]
        shares = {share.request_id: share for share in step.requests}
        for index, lane in enumerate(self.lanes):
            if lane is None or lane.ended:
                self.lanes[index] = None
            elif lane.request.request_id in shares:
                share = shares.pop(lane.request.request_id)
                self.lanes[index] = Lane(lane.request, share, state_word(share))
            else:
                lane.state = "skipped"
        for share in shares.values():  # those that this step admitted
            self._enter(share)
        for child in reversed([child for share in step.requests for child in self._unpark(share)]):
            self._returned[child.request_id] = child
        self.num_finished += len(step.finished)

    def _enter(self, share: RequestStep) -> None:
        """From the line into the first free lane."""
        request = self._requests[share.request_id]
        self._waiting.pop(share.request_id, None)
        self._returned.pop(share.request_id, None)
        if None not in self.lanes:
            self.lanes.append(None)
        self.lanes[self.lanes.index(None)] = Lane(request, share, state_word(share))

    def _drop(self, request_id: str) -> None:
        """Out of the line, or out of its lane. A leader that leaves early hands its children to the first of them."""
        self._waiting.pop(request_id, None)
        self._returned.pop(request_id, None)
        for index, lane in enumerate(self.lanes):
            if lane is not None and lane.request.request_id == request_id:
                self.lanes[index] = None
        for siblings in self._children.values():
            siblings[:] = [child for child in siblings if child.request_id != request_id]
        if children := self._children.pop(request_id, []):
            self._returned[children[0].request_id] = children[0]
            self._children[children[0].request_id] = children[1:]

    def _unpark(self, share: RequestStep) -> list[Request]:
        """The children that are next in line, in order, once their leader's prompt is computed."""
        computed = share.num_computed >= self._requests[share.request_id].num_prompt_tokens
        return self._children.pop(share.request_id, []) if computed else []


def state_word(share: RequestStep) -> str:
    """What a step did for a request: "prefill" or "decode", or how it ended it: "done: stop", "done: length", ..."""
    reason = RequestStatus[share.status].finish_reason
    if reason is not None:
        return f"done: {reason}"
    return "prefill" if share.num_prompt else "decode"
