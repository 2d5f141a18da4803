"""Contiguous KV: every request reserves the longest that it could become (M1, M2).

This is how Orca, the first engine with continuous batching, keeps K/V: one contiguous region per request, set aside at
admission, as long as its prompt and all the output it may still ask for. Simple, never in want of room halfway, and
wasteful: a request that may write 1,000 tokens and stops after 40 has held room for all of them. The waste is what
`usage()` shows (reserved against used) and what paging removes.

Invariants:
  1. reserved == the sum over all requests in the books of their regions, and reserved <= capacity.
  2. 0 <= used by a request <= its region, and it equals the request's `num_computed_tokens` after each step.
"""

from __future__ import annotations

from dataclasses import dataclass

from folovllm.kv_cache.interface import KVCacheManager, KVCopy, KVFork, KVPlan, KVUsage
from folovllm.request import Request


@dataclass
class Region:
    """One request's room, in tokens."""

    size: int
    used: int = 0


class ContiguousKVManager(KVCacheManager):
    """Books of one region of `max_total_tokens` per request, out of `capacity` tokens in all."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} is not valid; allowed: an integer >= 1")
        self.capacity = capacity
        self._reserved = 0
        self._regions: dict[str, Region] = {}

    def why_never_fits(self, request: Request) -> str | None:
        """None, or why the request at its longest is larger than the whole capacity."""
        if request.max_total_tokens <= self.capacity:
            return None
        return (
            f"it may grow to {request.max_total_tokens} tokens ({request.num_prompt_tokens} of prompt and "
            f"{request.max_output_tokens} of output) and the whole KV cache holds {self.capacity}"
        )

    def match(self, request: Request) -> int:
        """Always 0: K/V dies with its request here."""
        return 0

    def reserve(self, request: Request, num_new_tokens: int) -> KVPlan | None:
        """A plan inside the request's region; the region itself is taken at the first call."""
        region = self._regions.get(request.request_id) or self._take_region(request)
        return None if region is None else KVPlan(request.request_id, region.used, num_new_tokens)

    def fork(self, src: Request, dst: Request, num_tokens: int) -> KVFork | None:
        """A region of `dst`'s own, with a copy in it: contiguous K/V cannot be shared, only repeated."""
        source = self._regions.get(src.request_id)
        if source is None or num_tokens > source.used:
            raise RuntimeError(f"request {src.request_id!r} has no K/V for {num_tokens} tokens to fork")
        region = self._take_region(dst)
        if region is None:
            return None
        region.used = num_tokens
        return KVFork(num_tokens, (KVCopy(src.request_id, dst.request_id, num_tokens),))

    def commit(self, plan: KVPlan) -> None:
        """Count the plan's tokens as used."""
        region = self._regions[plan.request_id]
        if plan.start != region.used or plan.start + plan.num_tokens > region.size:
            raise RuntimeError(f"{plan} does not continue {region.used} tokens in a region of {region.size}")
        region.used += plan.num_tokens

    def release(self, request: Request) -> None:
        """Give the region back."""
        region = self._regions.pop(request.request_id, None)
        if region is not None:
            self._reserved -= region.size

    def usage(self) -> KVUsage:
        """Reserved regions and the tokens in them."""
        return KVUsage(self.capacity, self._reserved, sum(region.used for region in self._regions.values()))

    def _take_region(self, request: Request) -> Region | None:
        """Set aside the request's longest, or None if that is not free."""
        if self._reserved + request.max_total_tokens > self.capacity:
            return None
        region = self._regions[request.request_id] = Region(request.max_total_tokens)
        self._reserved += region.size
        return region
