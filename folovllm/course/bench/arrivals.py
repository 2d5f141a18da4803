"""When requests arrive, and how request-level batching forms batches of them.

Requests arrive at their `arrival`, in seconds after the start: all at 0, or as a Poisson process. A request with
`start_after` arrives by progress instead: when the requests that were there from the start have that many output tokens
each.

An engine with iteration-level scheduling admits a request at the next step. A server of batches has to decide when to
start a batch, and admits no request until the batch is done:

    static batching    wait until `batch_size` requests have arrived, or no more will arrive
    dynamic batching   the same, but at most `window` seconds after the first of them arrived

The window bounds the wait for a batch to form. Neither bounds the wait for its longest request; iteration-level
scheduling does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from folovllm.course.bench.workloads import BenchRequest


class Arrivals:
    """The requests that have not arrived yet. Times are seconds after the start.

    A request with `start_after` arrives once all others have that many output tokens each. A system that cannot run
    them all at once may never reach that point; for it, the total of their output tokens counts instead (`start_after`
    times their number), so that the same work is done by then.
    """

    def __init__(self, requests: Sequence[BenchRequest], max_num_seqs: int | None = None) -> None:
        self.timed = {i: requests[i].arrival for i in by_arrival(requests) if requests[i].start_after == 0}
        self.late = {i: r.start_after for i, r in enumerate(requests) if r.start_after > 0}
        self.first = list(self.timed)
        fewest = min((requests[i].max_tokens for i in self.first), default=0)
        for i, start_after in self.late.items():
            if start_after > fewest:
                raise ValueError(
                    f"requests[{i}].start_after={start_after} is not valid; allowed: at most {fewest}, the fewest "
                    "output tokens of the requests that are there from the start"
                )
        self.progress = dict.fromkeys(self.first, 0)  # request -> output tokens
        self.rule = "together" if max_num_seqs is not None and max_num_seqs < len(self.first) else "each"
        self.note = {"arrival_rule": self.rule} if self.late else {}

    def due(self, now: float) -> list[int]:
        """The requests that have arrived since the last call, in order of arrival."""
        due = [i for i, arrival in self.timed.items() if arrival <= now]
        if self.late:
            counts = [self.progress[i] for i in self.first]
            reached = min(counts) if self.rule == "each" else sum(counts) / len(counts)
            due += [i for i, start_after in self.late.items() if reached >= start_after]
        for i in due:
            self.timed.pop(i, None)
            self.late.pop(i, None)
        return due

    def wait(self, now: float) -> float:
        """Seconds until the next arrival by the clock; infinity if there is none."""
        return next(iter(self.timed.values()), math.inf) - now


def by_arrival(requests: Sequence[BenchRequest]) -> list[int]:
    """Indices of the requests in order of arrival; equal arrivals keep their order."""
    return sorted(range(len(requests)), key=lambda i: requests[i].arrival)


class Batch(NamedTuple):
    """The next batch: the first `size` waiting requests, started at `start`."""

    size: int
    start: float


FormBatch = Callable[[Sequence[float], float], Batch]
"""Forms the next batch from the sorted arrivals of all requests not yet served, and the time the machine is free."""


def static_batch(arrivals: Sequence[float], free: float, batch_size: int) -> Batch:
    """Static batching: `batch_size` requests, or all that are left, once the last of them has arrived."""
    size = min(batch_size, len(arrivals))
    return Batch(size, max(free, arrivals[size - 1]))


def dynamic_batch(arrivals: Sequence[float], free: float, batch_size: int, window: float) -> Batch:
    """Dynamic batching: starts once `batch_size` requests have arrived, or `window` seconds after the first arrival.

    Unlike `static_batch` it does not know that no more will arrive: a last batch that is not full waits its window.
    """
    full = arrivals[batch_size - 1] if batch_size <= len(arrivals) else math.inf
    start = max(free, min(full, arrivals[0] + window))
    there = sum(arrival <= start for arrival in arrivals)
    return Batch(min(batch_size, there), start)
