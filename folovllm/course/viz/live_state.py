"""The state of the live view: the trace of a run, summed up step by step.

It is built from `StepTrace` records alone, so a recorded run can be shown as well as a live one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from folovllm.engine.trace import EngineStats, RequestStep, StepTrace
from folovllm.kv_cache.interface import BlockSnapshot
from folovllm.request import RequestStatus

HISTORY = 400  # steps kept for the sparkline: more than a terminal is wide
MOST_QUEUED = 6  # waiting requests shown by id; the others are counted


@dataclass
class Lane:
    """The row of a running request, which it keeps until the step after its last."""

    share: RequestStep  # of the newest step that scheduled it
    # As from `state_word`, or "skipped": running, but not scheduled in the newest step (token budget used up)
    state: str
    num_cached: int = 0  # prompt tokens that were prefix cache hits

    @property
    def ended(self) -> bool:
        """Whether the row is free from the next step on."""
        return self.state.startswith("done")


class LiveState:
    """What the view shows: the records so far, summed up.

    num_requests: requests in the engine before the first step. policy: the scheduling policy. max_running:
    max_num_running_reqs. titles: request id -> text; the samples of one prompt ("7/0", "7/1") share the text of "7".
    """

    def __init__(
        self,
        num_requests: int = 0,
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
        self.lanes: list[Lane | None] = [None] * min(max_running, num_requests)
        self.history: deque[tuple[int, int]] = deque(maxlen=HISTORY)  # (prefill, decode) tokens of each step
        self.preempted: list[str] = []  # ids of preempted requests, in the order in which they resume
        self.owners: dict[str, int] = {}  # a small number for each request that holds blocks or is preempted
        self.uses_host = False  # whether any block was on the host so far
        self.uses_cache = False  # whether any block was in the prefix cache so far
        self.num_evicted = 0  # cached blocks evicted since the first step
        self._num_requests = num_requests

    @property
    def num_waiting(self) -> int:
        """Waiting requests, after the newest step."""
        return self._num_requests if self.step is None else self.step.num_waiting

    @property
    def num_running(self) -> int:
        """Running requests, after the newest step."""
        return 0 if self.step is None else self.step.num_running

    @property
    def num_requests(self) -> int:
        """Finished, running and waiting requests."""
        return self.num_finished + self.num_running + self.num_waiting

    @property
    def queue_head(self) -> list[str]:
        """The first ids of the queue, after the newest step."""
        return [] if self.step is None else self.step.next_in_line[:MOST_QUEUED]

    @property
    def blocks(self) -> BlockSnapshot | None:
        """The pool after the newest step, if it was recorded."""
        return None if self.step is None else self.step.blocks

    def title(self, request_id: str) -> str:
        """The request's text on one line, or ""."""
        text = self.titles.get(request_id) or self.titles.get(request_id.rpartition("/")[0], "")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    def observe(self, step: StepTrace) -> None:
        """Add the next step."""
        before, self.step = self.blocks, step
        self.stats.add(step)
        prefill = sum(share.num_prompt for share in step.requests)
        self.history.append((prefill, step.num_scheduled_tokens - prefill))
        self.num_finished += len(step.finished)
        shares = {share.request_id: share for share in step.requests}
        back = {*shares, *step.aborted, *step.preempted}
        self.preempted = [*reversed(step.preempted), *(i for i in self.preempted if i not in back)]
        self._move_lanes(shares, {*step.aborted, *step.preempted})
        if step.blocks is not None:
            self._number_owners(step.blocks)
            self.uses_cache = self.uses_cache or bool(step.blocks.cached)
            self.num_evicted += 0 if before is None else step.blocks.num_evicted - before.num_evicted

    def _move_lanes(self, shares: dict[str, RequestStep], gone: set[str]) -> None:
        """Every running request keeps its lane. Requests that this step admitted take the free lanes."""
        for index, lane in enumerate(self.lanes):
            if lane is None or lane.ended or lane.share.request_id in gone:
                self.lanes[index] = None
            elif lane.share.request_id in shares:
                share = shares.pop(lane.share.request_id)
                self.lanes[index] = Lane(share, state_word(share), lane.num_cached)
            else:
                lane.state = "skipped"
        for share in shares.values():
            if None not in self.lanes:
                self.lanes.append(None)
            self.lanes[self.lanes.index(None)] = Lane(share, state_word(share), share.num_cached)

    def _number_owners(self, blocks: BlockSnapshot) -> None:
        """Each new owner takes the smallest free number and keeps it until it is done."""
        owners = dict.fromkeys([*blocks.tables, *blocks.host_tables, *self.preempted])
        self.owners = {i: number for i, number in self.owners.items() if i in owners}
        taken = set(self.owners.values())
        free = (number for number in range(len(owners)) if number not in taken)
        self.owners |= {i: next(free) for i in owners if i not in self.owners}
        self.uses_host = self.uses_host or bool(blocks.host_tables)


def state_word(share: RequestStep) -> str:
    """What a step computed for a request, or how the request ended: "prefill", "chunk", "decode", "done: stop", ...

    "chunk": a part of its prompt that is not the last. "recompute": K/V that was dropped when it was preempted, that of
    its output included.
    """
    reason = RequestStatus[share.status].finish_reason
    if reason is not None:
        return f"done: {reason}"
    if share.num_scheduled > 1 and share.num_output > share.num_sampled:
        return "recompute"
    if share.num_prompt and share.num_computed < share.prompt_len:
        return "chunk"
    return "prefill" if share.num_prompt else "decode"
