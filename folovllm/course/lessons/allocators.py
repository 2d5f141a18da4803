"""Two allocators of contiguous memory, first fit and buddy, as baselines for paging.

Used by `folovllm.course.lessons.fragmentation`, not by the engine. Memory is a number of slots; a region is a start and
a length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Allocator(ABC):
    """Allocates regions of slots 0 to capacity - 1. Invariant: regions and gaps cover every slot exactly once."""

    def __init__(self) -> None:
        self.regions: dict[int, int] = {}  # start -> length, allocated
        self.gaps: dict[int, int] = {}  # start -> length, free

    @abstractmethod
    def length_for(self, size: int) -> int:
        """The length of the region allocated for `size` slots. Raises ValueError for a size below 1."""

    @abstractmethod
    def allocate(self, size: int) -> int | None:
        """The start of a region for `size` slots; None, with nothing changed, if no gap is long enough."""

    @abstractmethod
    def release(self, start: int) -> None:
        """Free the region at `start`. Raises KeyError if there is none."""

    @property
    def num_free(self) -> int:
        return sum(self.gaps.values())

    @property
    def largest_free(self) -> int:
        return max(self.gaps.values(), default=0)


class FirstFit(Allocator):
    """Regions of any length, each from the lowest gap that is long enough. Adjacent gaps are always merged."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        if capacity:
            self.gaps[0] = capacity

    def length_for(self, size: int) -> int:
        return at_least_one(size)

    def allocate(self, size: int) -> int | None:
        length = self.length_for(size)
        start = min((start for start, gap in self.gaps.items() if gap >= length), default=None)
        if start is not None:
            rest = self.gaps.pop(start) - length
            if rest:
                self.gaps[start + length] = rest
            self.regions[start] = length
        return start

    def release(self, start: int) -> None:
        # The gaps before and after the region, if any, are merged with it.
        length = self.regions.pop(start)
        length += self.gaps.pop(start + length, 0)
        before = next((s for s, gap in self.gaps.items() if s + gap == start), None)
        if before is not None:
            start, length = before, length + self.gaps.pop(before)
        self.gaps[start] = length


class Buddy(Allocator):
    """Regions of powers of two (Knowlton, CACM 1965): a gap is halved until it just fits; two free halves are merged.

    A capacity that is not a power of two is split into powers of two, the largest first. Invariants: every length is a
    power of two, every start is a multiple of it, and two buddies are never both gaps.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        start = 0
        for bit in reversed(range(capacity.bit_length())):
            if capacity & (1 << bit):
                self.gaps[start] = 1 << bit
                start += 1 << bit

    def length_for(self, size: int) -> int:
        return round_up_pow2(size)

    def allocate(self, size: int) -> int | None:
        # Best fit: the smallest gap that is long enough, and the lowest of equal ones.
        wanted = self.length_for(size)
        fitting = [(gap, start) for start, gap in self.gaps.items() if gap >= wanted]
        if not fitting:
            return None
        length, start = min(fitting)
        del self.gaps[start]
        while length > wanted:
            length //= 2
            self.gaps[start + length] = length
        self.regions[start] = length
        return start

    def release(self, start: int) -> None:
        # Merge as long as the buddy, the other half at start ^ length, is one free gap.
        length = self.regions.pop(start)
        while self.gaps.get(start ^ length) == length:
            del self.gaps[start ^ length]
            start = min(start, start ^ length)
            length *= 2
        self.gaps[start] = length


def round_up_pow2(value: int) -> int:
    """The smallest power of two that is at least `value`. Raises ValueError below 1."""
    return 1 << (at_least_one(value) - 1).bit_length()


def at_least_one(value: int) -> int:
    """`value`. Raises ValueError below 1."""
    if value < 1:
        raise ValueError(f"value={value} is not valid; allowed: an integer >= 1")
    return value
