"""Workloads: seeded requests as token ids, greedy, EOS ignored, so that every system does the same work.

A workload is data (`Workload`); `draw` turns it into requests. The lengths depend only on the workload's name and the
seed, the token ids on the vocabulary too, so a run can be repeated anywhere. Requests arrive at the start, or, with an
arrival rate, as a Poisson process with exponential gaps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class BenchRequest:
    """One request."""

    prompt_token_ids: list[int]
    max_tokens: int
    start_after: int = 0  # n > 0: it arrives when the others have n output tokens each
    arrival: float = 0.0  # else: it arrives that many seconds after the start

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(frozen=True)
class Late:
    """A request that arrives when all others have `start_after` output tokens."""

    prompt_len: int
    max_tokens: int
    start_after: int


@dataclass(frozen=True)
class Workload:
    """The parameters of a set of requests. Lengths are drawn uniformly from (low, high), both ends included."""

    name: str
    about: str
    num_requests: int
    prompt_len: tuple[int, int]
    max_tokens: tuple[int, int]
    shared_prefix: int = 0  # tokens that all prompts begin with; prompt_len counts the tokens after it
    late: Late | None = None

    @property
    def max_requests(self) -> int:
        """The number of requests."""
        return self.num_requests + (self.late is not None)

    def describe(self, arrival_rate: float | None = None) -> str:
        """The workload in one line; with a rate, "at once" becomes "arriving at RATE/s"."""
        return self.about if arrival_rate is None else self.about.replace("at once", f"arriving at {arrival_rate:g}/s")


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("w1", "one request, 128 in, 64 out", 1, (128, 128), (64, 64)),
        Workload("w2", "16 at once, 32-256 in, 16-128 out", 16, (32, 256), (16, 128)),
        Workload("w3", "16 at once, a shared prefix of 384 and 16 own in, 32 out", 16, (16, 16), (32, 32), 384),
        Workload(
            "mixed",
            "8 at once, 32 in, 96 out; 2048 in, 16 out arrives when they have 16 tokens each",
            8,
            (32, 32),
            (96, 96),
            late=Late(2048, 16, 16),
        ),
        Workload("paper", "256 at once, 100-1024 in, 100-1024 out, for GPUs", 256, (100, 1024), (100, 1024)),
    )
}


def get_workload(name: str) -> Workload:
    """The workload of that name. Raises ValueError that lists the names."""
    if name not in WORKLOADS:
        raise ValueError(f"workload={name!r} is not valid; allowed: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def draw(
    workload: Workload,
    vocab_size: int,
    seed: int = 0,
    scale: float = 1.0,
    warm_up: bool = False,
    arrival_rate: float | None = None,
) -> list[BenchRequest]:
    """The workload's requests in order of arrival, the late one last.

    scale: multiplies every length; at least one token is left (two of output, so that there is an ITL).
    warm_up: the same prompt lengths with other token ids and at most 4 output tokens, all arriving at the start.
    arrival_rate: requests per second of a Poisson process; the first arrives at 0, each later one after an exponential
    gap of mean 1 / arrival_rate. None: all arrive at the start.
    Raises ValueError for a scale, vocabulary or rate that is not valid.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale!r} is not valid; allowed: a number > 0 and <= 1")
    if arrival_rate is not None and not 0 < arrival_rate < math.inf:
        raise ValueError(f"arrival_rate={arrival_rate!r} is not valid; allowed: a number > 0, in requests per second")
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} is not valid; allowed: an integer >= 2")
    # A string seeds random.Random the same way on every platform and Python version.
    lengths = random.Random(f"{workload.name}/{seed}/lengths")
    ids = random.Random(f"{workload.name}/{seed}/{'warm-up' if warm_up else 'tokens'}")
    gaps = random.Random(f"{workload.name}/{seed}/arrivals")

    def tokens(count: int) -> list[int]:
        return [ids.randrange(vocab_size) for _ in range(count)]

    def prompt_len(count: int) -> int:
        return max(1, round(count * scale))

    def max_tokens(count: int) -> int:
        return min(max(2, round(count * scale)), 4 if warm_up else count)

    prefix = tokens(prompt_len(workload.shared_prefix)) if workload.shared_prefix else []
    rate = None if warm_up else arrival_rate
    waits = [0.0 if rate is None or i == 0 else gaps.expovariate(rate) for i in range(workload.num_requests)]
    requests = [
        BenchRequest(
            prefix + tokens(prompt_len(lengths.randint(*workload.prompt_len))),
            max_tokens(lengths.randint(*workload.max_tokens)),
            arrival=arrival,
        )
        for arrival in accumulate(waits)
    ]
    if (late := workload.late) is not None:
        start_after = 0 if warm_up else max(1, round(late.start_after * scale))
        requests.append(BenchRequest(tokens(prompt_len(late.prompt_len)), max_tokens(late.max_tokens), start_after))
    return requests


def longest(requests: Sequence[BenchRequest]) -> int:
    """Prompt and output tokens of the longest request: the `max_model_len` that the workload needs."""
    return max(r.num_prompt_tokens + r.max_tokens for r in requests)


def shared_prefix_len(requests: Sequence[BenchRequest]) -> int:
    """Tokens that all prompts begin with, short of a whole prompt; 0 for a single request."""
    if len(requests) < 2:
        return 0
    prompts = [r.prompt_token_ids for r in requests]
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest)
