"""The least time a workload could take on a machine: its roofline.

An ideal engine is assumed, without wasted steps, rows or bytes:

1. All prompts that are there at the start are computed in one pass; a shared prefix is computed and stored once.
2. Then every pass feeds one token of each unfinished request. The prompt of a request that arrives later is computed
   whole in one such pass.
3. A pass reads every weight of the linear layers and of the LM head once, and the rows of the embedding table that its
   tokens need. It writes K and V of its tokens, and reads for each request the K and V that earlier passes wrote for
   it. A shared prefix is stored once but read once per request; cascade attention would read less.
4. It computes 2 FLOPs per linear weight and token, 2 per LM-head weight and request, and attention over the unmasked
   keys.

A pass takes the longer of its bytes at the read bandwidth and its FLOPs at the best GEMM rate: perfect overlap is
assumed (Williams et al. 2009, "Roofline"). Norms, biases, activations, softmax and logits are not counted. The share of
the roofline is this least time over the measured time.

All requests must be there from the start or arrive by progress: with arrivals spread over time, a run takes at least as
long as the arrivals, however fast the machine is.

The bandwidth is that of memory. A model that fits the processor's caches may be faster than its roofline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from folovllm.course.bench.workloads import BenchRequest, shared_prefix_len
from folovllm.course.lessons.formulas import (
    attention_flops_per_token,
    linear_flops_per_token,
    linear_params,
    lm_head_params,
)
from folovllm.kv_cache.formulas import kv_bytes_per_token

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Row(NamedTuple):
    """One request's part of a pass: tokens at positions start, ..., start + num_tokens - 1.

    num_read: of the tokens before `start`, those whose K and V an earlier pass wrote.
    """

    start: int
    num_tokens: int
    num_read: int


@dataclass(frozen=True)
class Work:
    """The bytes and FLOPs of passes."""

    weight_bytes: int = 0
    kv_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.weight_bytes + other.weight_bytes, self.kv_bytes + other.kv_bytes, self.flops + other.flops)

    @property
    def bytes(self) -> int:
        """All bytes moved."""
        return self.weight_bytes + self.kv_bytes

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The least time at these ceilings."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def ideal_passes(requests: Sequence[BenchRequest]) -> list[list[Row]]:
    """The passes of the ideal engine, each a list with a row per request.

    Raises ValueError if a late request would arrive after the others are done, and for arrivals spread over time.
    """
    if any(r.arrival for r in requests):
        raise ValueError("the requests arrive over time, so their arrivals bound the time of a run as well")
    at_start = [r for r in requests if r.start_after == 0]
    prefix = shared_prefix_len(at_start)
    last = max(r.start_after + r.max_tokens for r in requests)
    passes: list[list[Row]] = []
    for step in range(last):
        rows = []
        for request in requests:
            age = step - request.start_after  # output tokens it has before this pass
            if age == 0:
                # The first request with the shared prefix computes it; its K/V stays on chip for this pass.
                shared = prefix if request.start_after == 0 and request is not at_start[0] else 0
                rows.append(Row(shared, request.num_prompt_tokens - shared, 0))
            elif 0 < age < request.max_tokens:
                written = request.num_prompt_tokens + age - 1
                rows.append(Row(written, 1, written))
        if not rows:
            raise ValueError(f"step {step} has no request to run; allowed: late requests that overlap with others")
        passes.append(rows)
    return passes


def pass_work(config: PretrainedConfig, rows: Sequence[Row], itemsize: int) -> Work:
    """Bytes and FLOPs of one pass. itemsize: bytes of a weight, and of an element of K and V.

    Raises ValueError for a model whose layers the formulas do not describe, and for a text beyond a sliding window.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    longest = max(row.start + row.num_tokens for row in rows)
    if window is not None and longest > window:
        raise ValueError(f"a text of {longest} tokens exceeds sliding_window={window}: no formula here covers that")
    tokens = sum(row.num_tokens for row in rows)
    # Token j (from 0) of a text attends to j + 1 keys.
    pairs = sum(row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) // 2 for row in rows)
    kv_tokens = tokens + sum(row.num_read for row in rows)
    weights = linear_params(config) + lm_head_params(config) + tokens * int(text.hidden_size)
    return Work(
        weight_bytes=weights * itemsize,
        kv_bytes=kv_tokens * kv_bytes_per_token(config, itemsize),
        flops=(
            linear_flops_per_token(config) * tokens
            + 2 * lm_head_params(config) * len(rows)
            + attention_flops_per_token(config, context=pairs)
        ),
    )


def least_seconds(
    config: PretrainedConfig,
    requests: Sequence[BenchRequest],
    itemsize: int,
    bytes_per_s: float,
    flops_per_s: float,
) -> float:
    """The sum of the least times of all passes. Raises ValueError as `pass_work` does, and for ceilings <= 0."""
    if bytes_per_s <= 0 or flops_per_s <= 0:
        raise ValueError(f"bytes_per_s={bytes_per_s}, flops_per_s={flops_per_s}; allowed: numbers > 0")
    passes = ideal_passes(requests)
    return sum(pass_work(config, rows, itemsize).seconds(bytes_per_s, flops_per_s) for rows in passes)
