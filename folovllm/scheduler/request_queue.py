"""The queue of waiting requests. Its order is the scheduling policy (vLLM: `vllm/v1/core/sched/request_queue.py`).

- fcfs: first come, first served.
- priority: the lowest `priority` first; among equals, the earliest arrival.
- sjf: shortest job first: the smallest upper bound on tokens left to compute and to sample; among equals, the
  earliest arrival. It gives the lowest mean waiting time and can starve long requests. vLLM does not have this one.

Each operation costs O(log n), amortized; `first` costs O(count log n).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from folovllm.checks import check_choice
from folovllm.request import Request

Rank = tuple[float, ...]


@dataclass(order=True)
class _Entry:
    """A request in the heap, ordered by rank, then by turn. Without a request it is a gap that a removal left."""

    rank: Rank
    turn: int
    request: Request | None = field(compare=False)


class RequestQueue:
    """Waiting requests, each at most once, the smallest rank first, on a binary heap.

    A request's rank changes only with `update_rank`. A request that is removed from the middle leaves a gap. A gap is
    skipped when it reaches the front, and when there are more gaps than requests, the heap is built anew.
    """

    def __init__(self, rank: Callable[[Request], Rank]) -> None:
        self._rank = rank
        self._heap: list[_Entry] = []
        self._entries: dict[str, _Entry] = {}  # by request id
        self._last_turn = self._first_turn = 0

    def add_request(self, request: Request) -> None:
        """Insert behind all requests of the same rank."""
        self._last_turn += 1
        self._insert(request, self._last_turn)

    def prepend_request(self, request: Request) -> None:
        """Insert before all requests of the same rank: a preempted request, or a fork that is new."""
        self._first_turn -= 1
        self._insert(request, self._first_turn)

    def _insert(self, request: Request, turn: int) -> None:
        entry = self._entries[request.request_id] = _Entry(self._rank(request), turn, request)
        heapq.heappush(self._heap, entry)

    def peek_request(self) -> Request:
        """The first request, which stays. Raises IndexError for an empty queue."""
        while self._heap:
            request = self._heap[0].request
            if request is not None:
                return request
            heapq.heappop(self._heap)
        raise IndexError("peek at an empty queue")

    def pop_request(self) -> Request:
        """Take the first request. Raises IndexError for an empty queue."""
        request = self.peek_request()
        self.remove_request(request)
        return request

    def remove_request(self, request: Request) -> None:
        """Take a request out, wherever it is. Raises KeyError for one that is not in the queue."""
        self._entries.pop(request.request_id).request = None
        if len(self._heap) > 2 * len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def update_rank(self, request: Request) -> None:
        """The request's rank has changed: move it, but keep its turn among equals. Raises KeyError if it is absent."""
        turn = self._entries[request.request_id].turn
        self.remove_request(request)
        self._insert(request, turn)

    def first(self, count: int) -> list[Request]:
        """The first `count` requests in order, or all if there are fewer. They stay. O(count log n) on average."""
        entries: list[_Entry] = []
        while self._heap and len(entries) < count:
            entry = heapq.heappop(self._heap)
            if entry.request is not None:
                entries.append(entry)
        for entry in entries:
            heapq.heappush(self._heap, entry)
        return [entry.request for entry in entries if entry.request is not None]

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)


def fcfs_rank(request: Request) -> Rank:
    """All equal: the turn decides."""
    return ()


def priority_rank(request: Request) -> Rank:
    """Lower priority values first, then the earlier arrival (vLLM's order)."""
    return (request.priority, request.arrival_time)


def sjf_rank(request: Request) -> Rank:
    """Fewest tokens left at most: those known and not computed yet, and those that may still be sampled."""
    return (request.max_total_tokens - request.num_computed_tokens, request.arrival_time)


RANKS = {"fcfs": fcfs_rank, "priority": priority_rank, "sjf": sjf_rank}


def create_request_queue(policy: str) -> RequestQueue:
    """The queue of a scheduling policy. Raises ValueError for an unknown one."""
    check_choice("scheduling_policy", policy, tuple(RANKS))
    return RequestQueue(RANKS[policy])
