"""Contiguous KV: every request reserves the longest it could ever become (M1, M2).

FasterTransformer and the first engine with continuous batching, Orca, kept K/V like this: one contiguous region per
request, as long as the model allows, reserved at admission. It is simple, a running request never lacks memory, and it
is wasteful: a request that stops after 40 tokens has reserved `max_model_len` of them. `usage()` shows the waste
(reserved against used), and paging removes it.

Invariants:
  1. reserved == (requests that hold a region) * region, and reserved <= capacity.
  2. 0 <= used by a request <= region, and it equals the request's `num_computed_tokens` after each step.
"""

from __future__ import annotations

from folovllm.kv_cache.interface import KVCacheManager, KVPlan, KVUsage
from folovllm.request import Request


class ContiguousKVManager(KVCacheManager):
    """One region of `max_model_len` tokens per request, out of `capacity` tokens in all."""

    def __init__(self, capacity: int, max_model_len: int) -> None:
        if capacity < 1 or max_model_len < 1:
            raise ValueError(f"capacity={capacity}, max_model_len={max_model_len}; allowed: integers >= 1")
        self.capacity = capacity
        # With less capacity than that, the region is all of it, and `why_never_fits` refuses longer requests.
        self.region = min(max_model_len, capacity)
        self._used: dict[str, int] = {}  # request id -> tokens with K/V, for each request that holds a region

    @property
    def longest_request(self) -> int:
        return self.region + 1

    def why_never_fits(self, request: Request) -> str | None:
        """None, or why the request at its longest is larger than the whole capacity."""
        if request.max_total_tokens <= self.longest_request:
            return None
        return (
            f"it may grow to {request.max_total_tokens} tokens ({request.num_prompt_tokens} of prompt and "
            f"{request.max_output_tokens} of output), all but the last of which need K/V, and the whole KV cache holds "
            f"{self.region}"
        )

    def get_computed_blocks(self, request: Request) -> int:
        """Always 0: K/V dies with its request here."""
        return 0

    def allocate_slots(self, request: Request, num_new_tokens: int, spare: bool = False) -> KVPlan | None:
        """A plan inside the request's region, which the first call reserves."""
        if request.request_id not in self._used:
            if (len(self._used) + 1) * self.region > self.capacity:
                return None
            self._used[request.request_id] = 0
        return KVPlan(request.request_id, self._used[request.request_id], num_new_tokens)

    def cache_blocks(self, plan: KVPlan) -> None:
        """Count the plan's tokens as used."""
        used = self._used[plan.request_id] + plan.num_tokens
        if plan.start != self._used[plan.request_id] or used > self.region:
            raise RuntimeError(f"{plan} does not continue {self._used[plan.request_id]} tokens in {self.region}")
        self._used[plan.request_id] = used

    def free(self, request: Request) -> None:
        """Free the region."""
        self._used.pop(request.request_id, None)

    def usage(self) -> KVUsage:
        """Reserved regions and the tokens in them."""
        return KVUsage(self.capacity, len(self._used) * self.region, sum(self._used.values()))
