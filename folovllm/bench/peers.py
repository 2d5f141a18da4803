"""Hugging Face's three ways to serve several requests: the peers that the milestones are measured against.

- sequential: `generate` for one request after the other.
- static: one `generate` for all, left-padded to the longest prompt. The batch runs until its longest output is done;
  what a row produces beyond its own request's length is work, but not output.
- continuous: the manager behind `generate_batch`, with a `max_new_tokens` per request.

All three are greedy, without an EOS, and get token ids. Times are those at which a token reaches the host: the streamer
of `generate` is called with each step's tokens; the manager stamps each token if asked to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from folovllm.bench.engines import Arrival
from folovllm.bench.record import Measured
from folovllm.bench.workloads import BenchRequest

# The manager's own defaults look for memory to fill, which takes 10 s or more on a CPU. These two were the fastest of
# 16 and 256 tokens per page, 256 and 2048 tokens per step, on w2.
CPU_PAGE_SIZE = 16
CPU_MAX_BATCH_TOKENS = 256


class TokenClock(BaseStreamer):
    """A streamer that notes each step's tokens and when they came."""

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
    """Greedy, never stopped by an EOS."""
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None, pad_token_id=0)


def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> TokenClock:
    """Greedy `generate` on a batch, left-padded with an attention mask where prompts differ in length."""
    width = max(map(len, prompts))
    device = model.device
    input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, L]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, L]
    clock = TokenClock()
    # `generate` fills what a passed config leaves unset from the model's own, an EOS included: put that aside.
    own = model.generation_config
    settings = greedy_config(max_new_tokens)
    model.generation_config = settings
    try:
        cast(Any, model).generate(input_ids, attention_mask=mask, generation_config=settings, streamer=clock)
    finally:
        model.generation_config = own
    return clock


def run_sequential(model: PreTrainedModel, requests: Sequence[BenchRequest]) -> Measured:
    """One request after the other; those that wait do so from the common start. See `Measured`."""
    start = time.perf_counter()
    clocks = [generate(model, [r.prompt_token_ids], r.max_tokens) for r in requests]
    # A DynamicCache grows with its request and is dropped with it. The last token is never fed back.
    kv = max(r.num_prompt_tokens + r.max_tokens - 1 for r in requests)
    return Measured(
        arrivals=[start] * len(requests),
        finished=clocks[-1].times[-1],
        token_ids=[[row[0] for row in clock.steps] for clock in clocks],
        token_times=[clock.times for clock in clocks],
        kv_reserved_tokens=kv,
        kv_used_tokens=kv,
        padding_share=0.0,
    )


def run_static(model: PreTrainedModel, requests: Sequence[BenchRequest]) -> Measured:
    """All requests in one padded batch. See `Measured`."""
    start = time.perf_counter()
    steps = max(r.max_tokens for r in requests)
    clock = generate(model, [r.prompt_token_ids for r in requests], steps)
    # Every row holds K/V of as many positions as the longest one, and computes as many.
    rows, width = len(requests), max(r.num_prompt_tokens for r in requests)
    computed = rows * (width + steps - 1)
    needed = sum(r.num_prompt_tokens + r.max_tokens - 1 for r in requests)
    return Measured(
        arrivals=[start] * rows,
        finished=clock.times[-1],
        token_ids=[[step[i] for step in clock.steps[: r.max_tokens]] for i, r in enumerate(requests)],
        token_times=[clock.times[: r.max_tokens] for r in requests],
        kv_reserved_tokens=computed,
        kv_used_tokens=needed,
        padding_share=1 - needed / computed,
    )


def continuous_config(device_type: str, requests: Sequence[BenchRequest]) -> ContinuousBatchingConfig:
    """On a CPU a pool that holds all requests at their longest; on a GPU what the manager finds best."""
    if device_type != "cpu":
        return ContinuousBatchingConfig()
    known = {f.name for f in fields(ContinuousBatchingConfig)}
    page_size = "page_size" if "page_size" in known else "block_size"  # its name before transformers 5.18
    blocks = sum(-(-(r.num_prompt_tokens + r.max_tokens) // CPU_PAGE_SIZE) + 1 for r in requests)
    settings: dict[str, Any] = {
        page_size: CPU_PAGE_SIZE,
        "num_blocks": blocks,
        "max_batch_tokens": CPU_MAX_BATCH_TOKENS,
        "max_requests_per_batch": len(requests),
    }
    return ContinuousBatchingConfig(**settings)


def run_continuous(model: PreTrainedModel, requests: Sequence[BenchRequest]) -> Measured:
    """A new manager, and so a new prefix cache; its set-up is not timed. See `Measured`.

    Late requests are added when the tokens streamed so far say so; without them nothing is streamed. The manager does
    not say how much of its pool requests hold, how much it pads, or how long its forwards take.
    Raises RuntimeError if the manager fails or loses a request.
    """
    settings = greedy_config()
    settings.eos_token_id = -1  # the manager's "none"
    arrival = Arrival(requests)
    arrivals: dict[int, float] = {}
    outputs: dict[int, Any] = {}
    with cast(Any, model).continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=continuous_config(model.device.type, requests)
    ) as manager:

        def add(i: int) -> None:
            arrivals[i] = time.perf_counter()
            manager.add_request(
                list(requests[i].prompt_token_ids),
                request_id=str(i),
                max_new_tokens=requests[i].max_tokens,
                streaming=bool(arrival.late),
                record_timestamps=True,
            )

        for i in arrival.first:
            add(i)
        while len(outputs) < len(requests):
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the manager of continuous batching stopped before all requests were done")
                continue
            if output.error is not None:
                raise RuntimeError(f"continuous batching failed: {output.error}")
            if output.is_finished():
                outputs[int(output.request_id)] = output
            arrival.progress[int(output.request_id)] = len(output.generated_tokens)
            for i in arrival.due():
                add(i)
        seen_by_us = time.perf_counter()
        pool = manager.continuous_batching_config.num_blocks
    done = [outputs[i] for i in range(len(requests))]
    times = [o.timestamps for o in done]
    # A request that was preempted starts a new list of stamps: then there are no honest ones for all tokens.
    complete = all(t is not None and len(t) == r.max_tokens for t, r in zip(times, requests, strict=True))
    return Measured(
        arrivals=[arrivals[i] for i in range(len(requests))],
        finished=max(t[-1] for t in times) if complete else seen_by_us,
        token_ids=[list(o.generated_tokens) for o in done],
        token_times=times if complete else None,
        extra={"pool_blocks": pool, **arrival.note},
    )


RUN_PEER: dict[str, Callable[[PreTrainedModel, Sequence[BenchRequest]], Measured]] = {
    "sequential": run_sequential,
    "static": run_static,
    "continuous": run_continuous,
}
