"""Hugging Face's ways to serve several requests: the peers that the milestones are measured against.

- sequential: `generate` for one request after the other.
- static: one `generate` for all, left-padded to the longest prompt. The batch runs until its longest output is done;
  tokens of a row beyond its own request's length are work, but not output. With a batch size: batch after batch, as in
  the model servers before Orca.
- dynamic: the same, with a limit on how long a batch waits to be full.
- continuous: the manager behind `generate_batch`, with a `max_new_tokens` per request.

All are greedy, without EOS, on token ids. A token's time is when it reaches the host: `generate` calls the streamer
with each step's tokens; the manager can record a timestamp per token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from folovllm.checks import check_int
from folovllm.course.bench.arrivals import Arrivals, FormBatch, by_arrival, dynamic_batch, static_batch
from folovllm.course.bench.record import Measured
from folovllm.course.bench.systems import System
from folovllm.course.bench.workloads import BenchRequest
from folovllm.math_utils import cdiv

# The manager's defaults profile memory, which takes 10 s or more on a CPU. These two values were the fastest of 16 and
# 256 tokens per page, 256 and 2048 tokens per step, on w2.
CPU_PAGE_SIZE = 16
CPU_MAX_BATCH_TOKENS = 256


class TokenClock(BaseStreamer):
    """A streamer that records each step's tokens and their time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.steps: list[list[int]] = []  # one token per row
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """First the prompt, then the tokens of one step, [B]."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.steps.append(value.tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""


def greedy_config(max_new_tokens: int | None = None) -> GenerationConfig:
    """Greedy, without EOS."""
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None, pad_token_id=0)


def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> TokenClock:
    """Greedy `generate` on a batch, left-padded with an attention mask where prompts differ in length."""
    width = max(map(len, prompts))
    device = model.device
    input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, L]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, L]
    clock = TokenClock()
    # `generate` fills fields that a passed config leaves unset from the model's config, EOS included: remove it here.
    own = model.generation_config
    settings = greedy_config(max_new_tokens)
    model.generation_config = settings
    try:
        cast(Any, model).generate(input_ids, attention_mask=mask, generation_config=settings, streamer=clock)
    finally:
        model.generation_config = own
    return clock


@dataclass(frozen=True)
class BatchWork:
    """What `generate` computes for a left-padded batch, and how much of it is needed."""

    rows: int  # tokens through the model, and tokens of K/V in the batch at its end
    rows_needed: int
    kv_columns: int  # columns of K/V that the rows attend over, summed over the forwards
    kv_columns_needed: int


def batch_work(requests: Sequence[BenchRequest]) -> BatchWork:
    """Every row has the longest prompt's width and runs as long as the longest output. The last token is not fed."""
    count, width = len(requests), max(r.num_prompt_tokens for r in requests)
    steps = max(r.max_tokens for r in requests)
    return BatchWork(
        rows=count * (width + steps - 1),
        rows_needed=sum(r.num_prompt_tokens + r.max_tokens - 1 for r in requests),
        kv_columns=count * sum(width + step for step in range(steps)),
        kv_columns_needed=sum(r.num_prompt_tokens + step for r in requests for step in range(r.max_tokens)),
    )


def run_sequential(model: PreTrainedModel, requests: Sequence[BenchRequest]) -> Measured:
    """One request after the other, in order of arrival: batches of one. See `run_static`."""
    return run_static(model, requests, batch_size=1)


def run_static(model: PreTrainedModel, requests: Sequence[BenchRequest], batch_size: int | None = None) -> Measured:
    """Padded batches of `batch_size` requests in order of arrival, each started once all of them have arrived.

    None: all requests in one batch. `extra["batches"]` lists each batch's requests (indices), start and end, on the
    clock of the token times. Raises ValueError for a batch size below 1.
    """
    size = len(requests) if batch_size is None else batch_size
    check_int("batch_size", size, 1)
    return _run_batches(model, requests, partial(static_batch, batch_size=size))


def run_dynamic(model: PreTrainedModel, requests: Sequence[BenchRequest], batch_size: int, window: float) -> Measured:
    """As `run_static`, but a batch that is not full starts `window` seconds after its first request arrived.

    It starts later if the machine is busy. Raises ValueError for a batch size below 1 and for a window that is not a
    number of seconds >= 0.
    """
    check_int("batch_size", batch_size, 1)
    if not 0 <= window < math.inf:
        raise ValueError(f"window={window!r} is not valid; allowed: a number >= 0, in seconds")
    return _run_batches(model, requests, partial(dynamic_batch, batch_size=batch_size, window=window))


def _run_batches(model: PreTrainedModel, requests: Sequence[BenchRequest], form_batch: FormBatch) -> Measured:
    """Batch after batch, one `generate` call each: no request joins or leaves a running batch."""
    for i, request in enumerate(requests):
        if request.start_after:
            raise ValueError(
                f"requests[{i}].start_after={request.start_after} is not valid; allowed: 0, since `generate` takes no "
                "request while it runs"
            )
    waiting = by_arrival(requests)
    token_ids: dict[int, list[int]] = {}
    token_times: dict[int, list[float]] = {}
    batches: list[dict[str, Any]] = []
    work: list[BatchWork] = []
    idle, start = 0.0, time.perf_counter()
    while waiting:
        free = time.perf_counter()
        size, begin = form_batch([requests[i].arrival for i in waiting], free - start)
        sleep_until(start + begin)
        began = time.perf_counter()
        idle += began - free
        batch, waiting = waiting[:size], waiting[size:]
        members = [requests[i] for i in batch]
        clock = generate(model, [r.prompt_token_ids for r in members], max(r.max_tokens for r in members))
        for row, (i, request) in enumerate(zip(batch, members, strict=True)):
            token_ids[i] = [tokens[row] for tokens in clock.steps[: request.max_tokens]]
            token_times[i] = clock.times[: request.max_tokens]
        batches.append({"requests": batch, "start": began, "end": clock.times[-1]})
        work.append(batch_work(members))
    everyone = range(len(requests))
    return Measured(
        arrivals=[start + r.arrival for r in requests],
        finished=batches[-1]["end"],
        token_ids=[token_ids[i] for i in everyone],
        token_times=[token_times[i] for i in everyone],
        # A DynamicCache grows with its batch and is dropped with it.
        kv_reserved_tokens=max(w.rows for w in work),
        kv_used_tokens=max(w.rows_needed for w in work),
        padding_share=1 - sum(w.rows_needed for w in work) / sum(w.rows for w in work),
        kv_padding_share=1 - sum(w.kv_columns_needed for w in work) / sum(w.kv_columns for w in work),
        idle_seconds=idle,
        extra={"batches": batches},
    )


def sleep_until(moment: float) -> None:
    """Return once `time.perf_counter` has reached `moment`."""
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


def continuous_config(device_type: str, requests: Sequence[BenchRequest]) -> ContinuousBatchingConfig:
    """On a CPU a pool for all requests at their final length; on a GPU the manager's defaults."""
    if device_type != "cpu":
        return ContinuousBatchingConfig()
    known = {f.name for f in fields(ContinuousBatchingConfig)}
    page_size = "page_size" if "page_size" in known else "block_size"  # its name before transformers 5.18
    blocks = sum(cdiv(r.num_prompt_tokens + r.max_tokens, CPU_PAGE_SIZE) + 1 for r in requests)
    settings: dict[str, Any] = {
        page_size: CPU_PAGE_SIZE,
        "num_blocks": blocks,
        "max_batch_tokens": CPU_MAX_BATCH_TOKENS,
        "max_requests_per_batch": len(requests),
    }
    return ContinuousBatchingConfig(**settings)


def run_continuous(model: PreTrainedModel, requests: Sequence[BenchRequest]) -> Measured:
    """Serve with a new manager, which has an empty prefix cache. Its set-up is not timed. See `Measured`.

    Requests are added at their arrival, late ones according to the tokens streamed so far; without late ones nothing is
    streamed. The manager does not report held blocks, padding, forward time or idle time.
    Raises RuntimeError if the manager fails or loses a request.
    """
    settings = greedy_config()
    settings.eos_token_id = -1  # the manager's "none"
    arrivals = Arrivals(requests)
    came: dict[int, float] = {}
    outputs: dict[int, Any] = {}
    with cast(Any, model).continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=continuous_config(model.device.type, requests)
    ) as manager:
        start = time.perf_counter()
        while len(outputs) < len(requests):
            now = time.perf_counter()
            for i in arrivals.due(now - start):
                came[i] = now if requests[i].start_after else start + requests[i].arrival
                manager.add_request(
                    list(requests[i].prompt_token_ids),
                    request_id=str(i),
                    max_new_tokens=requests[i].max_tokens,
                    streaming=bool(arrivals.late),
                    record_timestamps=True,
                )
            output = manager.get_result(timeout=min(1.0, arrivals.wait(now - start)))
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the manager of continuous batching stopped before all requests were done")
                continue
            if output.error is not None:
                raise RuntimeError(f"continuous batching failed: {output.error}")
            if output.is_finished():
                outputs[int(output.request_id)] = output
            arrivals.progress[int(output.request_id)] = len(output.generated_tokens)
        seen_by_us = time.perf_counter()
        pool = manager.continuous_batching_config.num_blocks
    done = [outputs[i] for i in range(len(requests))]
    times = [o.timestamps for o in done]
    # A preempted request starts a new list of timestamps, so the times of its first tokens are lost.
    complete = all(t is not None and len(t) == r.max_tokens for t, r in zip(times, requests, strict=True))
    return Measured(
        arrivals=[came[i] for i in range(len(requests))],
        finished=max(t[-1] for t in times) if complete else seen_by_us,
        token_ids=[list(o.generated_tokens) for o in done],
        token_times=times if complete else None,
        idle_seconds=None,
        extra={"pool_blocks": pool, **arrivals.note},
    )


def run_peer(system: System, model: PreTrainedModel, requests: Sequence[BenchRequest]) -> Measured:
    """Serve the requests with a peer. Raises ValueError for a system that is not a peer."""
    if system.peer == "sequential":
        return run_sequential(model, requests)
    if system.peer == "static":
        return run_static(model, requests, system.batch_size)
    if system.peer == "dynamic" and system.batch_size is not None and system.window is not None:
        return run_dynamic(model, requests, system.batch_size, system.window)
    if system.peer == "continuous":
        return run_continuous(model, requests)
    raise ValueError(f"system={system.name!r} is not valid; allowed: a peer")
