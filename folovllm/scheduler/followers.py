"""Requests that wait for another one to compute what they have in common.

With chunked prefill a long prompt takes several steps. Whoever comes meanwhile and begins with the same tokens would
compute them a second time. So it steps aside, lets others pass, and returns to the front of the line when that part of
the prompt is computed. Nobody waits for one that does not run.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass

from folovllm.request import Request


@dataclass
class Place:
    """A follower, and how many of the leader's tokens it waits for."""

    until: int
    turn: int  # the order of coming
    request: Request


class Followers:
    """Followers by leader, those that wait for the fewest tokens first."""

    def __init__(self) -> None:
        self._places: dict[str, list[Place]] = {}  # by leader
        self._leaders: dict[str, str] = {}  # follower -> leader
        self._turn = 0

    def add(self, leader_id: str, until: int, request: Request) -> None:
        """`request` waits until the leader has `until` tokens with K/V, or is gone."""
        self._turn += 1
        insort(self._places.setdefault(leader_id, []), Place(until, self._turn, request), key=lambda p: p.until)
        self._leaders[request.request_id] = leader_id

    def wake(self, leader_id: str, num_tokens: int | None = None) -> list[Request]:
        """Those that wait for no more than `num_tokens` of the leader, or all of them, in the order of coming."""
        places = self._places.pop(leader_id, [])
        count = len(places) if num_tokens is None else bisect_right(places, num_tokens, key=lambda p: p.until)
        if places[count:]:
            self._places[leader_id] = places[count:]
        ready = sorted(places[:count], key=lambda p: p.turn)
        for place in ready:
            del self._leaders[place.request.request_id]
        return [place.request for place in ready]

    def remove(self, request: Request) -> None:
        """It waits no longer. Raises KeyError for one that is not here."""
        leader_id = self._leaders.pop(request.request_id)
        places = [place for place in self._places.pop(leader_id) if place.request is not request]
        if places:
            self._places[leader_id] = places

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._leaders

    def __len__(self) -> int:
        return len(self._leaders)
