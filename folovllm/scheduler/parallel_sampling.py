"""Parallel sampling: the n samples of one prompt, where K/V can be shared (M3, M4).

Sample 0 leads: it is queued and computes the prompt. The others are parked until then, fork its blocks at the end of
that step, and go to the front of the queue. From there on no sample depends on another.
"""

from __future__ import annotations

from folovllm.request import Request


class ParkedSamples:
    """Samples that wait for their leader (`Request.parent_id`) to compute the prompt, by leader, in order."""

    def __init__(self) -> None:
        self._by_leader: dict[str, list[Request]] = {}

    def add(self, sample: Request) -> None:
        """Park a sample behind those of its leader that are parked already."""
        self._by_leader.setdefault(str(sample.parent_id), []).append(sample)

    def pop(self, leader_id: str) -> list[Request]:
        """Take out all samples of a leader."""
        return self._by_leader.pop(leader_id, [])

    def remove(self, sample: Request) -> None:
        """Take out one sample. It must be parked."""
        leader_id = str(sample.parent_id)
        rest = [other for other in self.pop(leader_id) if other is not sample]
        if rest:
            self._by_leader[leader_id] = rest

    def promote(self, leader_id: str) -> Request | None:
        """The leader ended before the prompt was computed: its first parked sample, if any, leads the others."""
        samples = self.pop(leader_id)
        if not samples:
            return None
        first, *others = samples
        first.parent_id = None
        for sample in others:
            sample.parent_id = first.request_id
            self.add(sample)
        return first

    def __contains__(self, sample: Request) -> bool:
        return sample in self._by_leader.get(str(sample.parent_id), ())

    def __len__(self) -> int:
        return sum(map(len, self._by_leader.values()))
