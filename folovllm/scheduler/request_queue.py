"""The waiting line. Its order is the scheduling policy (vLLM: `vllm/v1/core/sched/request_queue.py`)."""

from __future__ import annotations

from collections import OrderedDict

from folovllm.request import Request


class FCFSQueue:
    """First come, first served. Every operation is O(1), removal from the middle included."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        """Join at the end."""
        self._requests[request.request_id] = request

    def prepend(self, request: Request) -> None:
        """Join in front: for a request whose turn has come already (a fork of a served one, or a preempted one)."""
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        """The next in line. Raises IndexError when nobody waits."""
        if not self._requests:
            raise IndexError("peek at an empty queue")
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        """Take the next in line. Raises IndexError when nobody waits."""
        if not self._requests:
            raise IndexError("pop from an empty queue")
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        """Leave the line from wherever one stands. Raises KeyError for a request that is not in it."""
        del self._requests[request.request_id]

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)
