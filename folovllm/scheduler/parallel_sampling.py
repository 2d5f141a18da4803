"""Who starts with whose K/V: the samples of one prompt, and the beams of a search.

A leader computes the prompt. Its children are parked until it has, because a fork of K/V needs K/V. From then on they
wait in line like anybody else, and the leader must keep its K/V until the last of them has started or gone.
"""

from __future__ import annotations

from folovllm.request import Request


class Forks:
    """Children by leader: those parked, in order, and the ids of all that are due to fork it."""

    def __init__(self) -> None:
        self._parked: dict[str, list[Request]] = {}
        self._due: dict[str, set[str]] = {}

    def add(self, leader_id: str, child: Request, park: bool) -> None:
        """`child` will fork the leader, and is parked until then if the leader has not computed the prompt."""
        self._due.setdefault(leader_id, set()).add(child.request_id)
        if park:
            self._parked.setdefault(leader_id, []).append(child)

    def due(self, leader_id: str) -> list[str]:
        """The children that need the leader's K/V."""
        return list(self._due.get(leader_id, ()))

    def has_parked(self, leader_id: str) -> bool:
        """Whether children wait for the leader's prompt."""
        return leader_id in self._parked

    def unpark(self, leader: Request) -> list[Request]:
        """The children that are next in line, in order, if the leader's prompt is computed."""
        if leader.num_computed_tokens < leader.num_prompt_tokens:
            return []
        return self._parked.pop(leader.request_id, [])

    def promote(self, leader: Request) -> Request:
        """A leader that goes before its prompt is computed leaves the lead to its first child."""
        first, *others = self._parked.pop(leader.request_id)
        del self._due[leader.request_id]
        first.parent_id = None
        for child in others:
            child.parent_id = first.request_id
            self.add(first.request_id, child, park=True)
        return first

    def done(self, child: Request) -> str | None:
        """`child` needs its leader's K/V no more: it has its own, or is gone. The leader's id if it was the last."""
        leader_id, child.parent_id = child.parent_id, None
        due = self._due.get(leader_id) if leader_id is not None else None
        if leader_id is None or due is None:
            return None
        due.discard(child.request_id)
        parked = self._parked.get(leader_id, [])
        if child in parked:
            parked.remove(child)
        if due:
            return None
        del self._due[leader_id]
        self._parked.pop(leader_id, None)
        return leader_id

    def __contains__(self, child: Request) -> bool:
        """Whether it is parked."""
        return child.parent_id is not None and child in self._parked.get(child.parent_id, ())

    def __len__(self) -> int:
        """Leaders whose K/V is still needed."""
        return len(self._due)
