"""The record of one run, and the numbers derived from it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Measured:
    """One system's run of one workload, on one clock (`time.perf_counter`). One list entry per request, in order."""

    arrivals: list[float]  # when each request arrived, whether or not the system could admit it
    finished: float
    token_ids: list[list[int]]
    # None where unknown, here and below
    token_times: list[list[float]] | None  # when each output token reached the host
    kv_capacity_tokens: int | None = None  # size of the KV memory in tokens
    kv_reserved_tokens: int | None = None  # peak of K/V reserved for requests, in tokens
    kv_used_tokens: int | None = None  # peak of K/V that requests need, in tokens
    padding_share: float | None = None  # of the token rows that the model computed: padding and unneeded tokens
    kv_padding_share: float | None = None  # the same of the columns of K/V in the batches, summed over the forwards
    forward_seconds: float | None = None  # spent inside the model's forward
    idle_seconds: float | None = 0.0  # spent waiting for arrivals
    # Other data; "batches" is a list of {"requests": indices, "start": s, "end": s} on the clock of the token times
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def wall_seconds(self) -> float:
        """Seconds from the first arrival to the last token."""
        return self.finished - min(self.arrivals)

    @property
    def output_tokens(self) -> int:
        """Output tokens that requests asked for."""
        return sum(map(len, self.token_ids))

    @property
    def ttfts(self) -> list[float] | None:
        """Per request, seconds from arrival to first token, waiting included."""
        if self.token_times is None:
            return None
        return [times[0] - arrival for times, arrival in zip(self.token_times, self.arrivals, strict=True)]

    @property
    def itls(self) -> list[float] | None:
        """Seconds between consecutive tokens of a request, all requests pooled."""
        if self.token_times is None:
            return None
        return [b - a for times in self.token_times for a, b in pairwise(times)]

    @property
    def overhead_share(self) -> float | None:
        """The share of the busy time (wall time without idle time) outside the model's forward."""
        if self.forward_seconds is None:
            return None
        return 1 - self.forward_seconds / (self.wall_seconds - (self.idle_seconds or 0.0))

    def to_json(self, kv_bytes_per_token: int | None) -> dict[str, Any]:
        """The run as plain data: times in seconds, K/V in bytes (None without `kv_bytes_per_token`).

        Start and end of batches are seconds after the first arrival.
        """

        def kv_bytes(tokens: int | None) -> int | None:
            return None if tokens is None or kv_bytes_per_token is None else tokens * kv_bytes_per_token

        wall = self.wall_seconds
        zero, batches = min(self.arrivals), self.extra.get("batches", [])
        moments = [{**b, "start": b["start"] - zero, "end": b["end"] - zero} for b in batches]
        return {
            "wall_s": wall,
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": self.output_tokens / wall,
            "ttft_s": distribution(self.ttfts),
            "itl_s": distribution(self.itls),
            "kv_capacity_bytes": kv_bytes(self.kv_capacity_tokens),
            "kv_reserved_bytes": kv_bytes(self.kv_reserved_tokens),
            "kv_used_bytes": kv_bytes(self.kv_used_tokens),
            "padding_share": self.padding_share,
            "kv_padding_share": self.kv_padding_share,
            "overhead_share": self.overhead_share,
            "idle_s": self.idle_seconds,
            "token_hashes": [token_hash(ids) for ids in self.token_ids],
            **self.extra,
            **({"batches": moments} if moments else {}),
        }


def token_hash(token_ids: Sequence[int]) -> str:
    """16 hexadecimal digits of a hash of an output."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]


def distribution(values: Sequence[float] | None) -> dict[str, float] | None:
    """p50, p99 and max; None without values."""
    if not values:
        return None
    return {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)}


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between the two nearest ranks (numpy's default). Raises ValueError for no values."""
    if not values:
        raise ValueError("values=[] is not valid; allowed: at least one number")
    if not 0 <= q <= 100:
        raise ValueError(f"q={q!r} is not valid; allowed: a number in [0, 100]")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
