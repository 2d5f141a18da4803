"""The waiting line. Its order is the scheduling policy (vLLM: `vllm/v1/core/sched/request_queue.py`).

- fcfs: first come, first served.
- priority: the lowest `priority` first; among equals, first come.
- sjf: shortest job first, which is the fewest tokens left at most, prompt and output together; among equals, first
  come. It gives the lowest mean waiting time and can starve long requests. This one is ours: vLLM does not have it.

No operation looks at everyone who waits: joining, leaving and each of the next in line cost O(1) under fcfs, and
O(log n) spread over the operations under the other two.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from folovllm.request import Request


class RequestQueue(ABC):
    """Requests that wait, each at most once, in the order in which they should run."""

    @abstractmethod
    def add_request(self, request: Request) -> None:
        """Join the line."""

    @abstractmethod
    def prepend_request(self, request: Request) -> None:
        """Join again, ahead of equals: for one whose turn had come (a preempted one, or a fork of a served one)."""

    @abstractmethod
    def peek_request(self) -> Request:
        """The next in line. Raises IndexError when nobody waits."""

    @abstractmethod
    def pop_request(self) -> Request:
        """Take the next in line. Raises IndexError when nobody waits."""

    @abstractmethod
    def remove_request(self, request: Request) -> None:
        """Leave the line from wherever one stands. Raises KeyError for a request that is not in it."""

    @abstractmethod
    def first(self, count: int) -> list[Request]:
        """The next `count` in line, in order, or as many as there are. They stay in it."""

    @abstractmethod
    def __contains__(self, request: Request) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...


class FCFSQueue(RequestQueue):
    """First come, first served. Every operation is O(1), removal from the middle included."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add_request(self, request: Request) -> None:
        """Join at the end."""
        self._requests[request.request_id] = request

    def prepend_request(self, request: Request) -> None:
        """Join in front of everyone."""
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def peek_request(self) -> Request:
        """The next in line. Raises IndexError when nobody waits."""
        if not self._requests:
            raise IndexError("peek at an empty queue")
        return next(iter(self._requests.values()))

    def pop_request(self) -> Request:
        """Take the next in line. Raises IndexError when nobody waits."""
        if not self._requests:
            raise IndexError("pop from an empty queue")
        return self._requests.popitem(last=False)[1]

    def remove_request(self, request: Request) -> None:
        """Leave the line from wherever one stands. Raises KeyError for a request that is not in it."""
        del self._requests[request.request_id]

    def first(self, count: int) -> list[Request]:
        """The next `count` in line, in order, or as many as there are. They stay in it."""
        return list(islice(self._requests.values(), count))

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)


@dataclass(order=True)
class _Place:
    """A place in a sorted line: the policy's rank, then the order of joining. Without a request it is a gap."""

    rank: tuple[float, ...]
    turn: int
    request: Request | None = field(compare=False)


class SortedQueue(RequestQueue):
    """The smallest rank first, on a binary heap.

    A request's rank must not change while it waits. Who leaves from the middle leaves a gap, which is skipped when it
    comes to the front; when gaps outnumber requests, the heap is built anew. So every operation is O(log n) on average.
    """

    def __init__(self, rank: Callable[[Request], tuple[float, ...]]) -> None:
        self._rank = rank
        self._heap: list[_Place] = []
        self._places: dict[str, _Place] = {}
        self._last_turn = self._first_turn = 0

    def add_request(self, request: Request) -> None:
        """Join behind all of the same rank."""
        self._last_turn += 1
        self._join(request, self._last_turn)

    def prepend_request(self, request: Request) -> None:
        """Join in front of all of the same rank; a better rank still goes first."""
        self._first_turn -= 1
        self._join(request, self._first_turn)

    def _join(self, request: Request, turn: int) -> None:
        place = _Place(self._rank(request), turn, request)
        self._places[request.request_id] = place
        heapq.heappush(self._heap, place)

    def peek_request(self) -> Request:
        """The next in line. Raises IndexError when nobody waits."""
        while self._heap:
            request = self._heap[0].request
            if request is not None:
                return request
            heapq.heappop(self._heap)
        raise IndexError("peek at an empty queue")

    def pop_request(self) -> Request:
        """Take the next in line. Raises IndexError when nobody waits."""
        request = self.peek_request()
        self.remove_request(request)
        return request

    def remove_request(self, request: Request) -> None:
        """Leave the line from wherever one stands. Raises KeyError for a request that is not in it."""
        self._places.pop(request.request_id).request = None
        if len(self._heap) > 2 * len(self._places):
            self._heap = list(self._places.values())
            heapq.heapify(self._heap)

    def first(self, count: int) -> list[Request]:
        """The next `count` in line, in order, or as many as there are. They stay in it. O(count log n) on average."""
        places: list[_Place] = []
        while self._heap and len(places) < count:
            place = heapq.heappop(self._heap)
            if place.request is not None:
                places.append(place)
        for place in places:
            heapq.heappush(self._heap, place)
        return [place.request for place in places if place.request is not None]

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._places

    def __len__(self) -> int:
        return len(self._places)


def priority_rank(request: Request) -> tuple[float, ...]:
    """Lower priority values first, then the earlier arrival (vLLM's order)."""
    return (request.priority, request.arrival_time)


def sjf_rank(request: Request) -> tuple[float, ...]:
    """Fewest tokens left at most: those known and not computed yet, and those that may still be sampled."""
    return (request.max_total_tokens - request.num_computed_tokens, request.arrival_time)


def create_request_queue(policy: str) -> RequestQueue:
    """The line for a scheduling policy. Raises ValueError for an unknown one."""
    if policy == "fcfs":
        return FCFSQueue()
    if policy == "priority":
        return SortedQueue(priority_rank)
    if policy == "sjf":
        return SortedQueue(sjf_rank)
    raise ValueError(f"scheduling_policy={policy!r} is not valid; allowed: 'fcfs', 'priority', 'sjf'")
