"""Runs a workload on a milestone of this engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from folovllm.config import MILESTONES
from folovllm.course.bench.arrivals import Arrivals
from folovllm.course.bench.record import Measured
from folovllm.course.bench.systems import System
from folovllm.course.bench.workloads import BenchRequest, longest
from folovllm.engine.trace import PHASES, Trace
from folovllm.entrypoints.llm import LLM
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams

TRACE_STEPS = 1_000_000  # more than any workload takes: the sums need every step


def engine_kwargs(
    system: System, requests: Sequence[BenchRequest], max_num_batched_tokens: int | None = None
) -> dict[str, Any]:
    """The keywords of `LLM` for this milestone and workload.

    All requests fit at once unless the system or the milestone has a limit, and max_model_len is what they need. Only
    milestones with chunked prefill get a token budget; others would refuse prompts longer than it.
    """
    if system.milestone is None:
        raise ValueError(f"system={system.name!r} is not valid; allowed: a milestone")
    preset = MILESTONES[system.milestone]
    limits = (len(requests), system.max_num_seqs, preset.max_num_seqs_limit)
    kwargs: dict[str, Any] = {
        "milestone": system.milestone,
        "max_model_len": longest(requests),
        "max_num_seqs": min(limit for limit in limits if limit is not None),
        "max_trace_steps": TRACE_STEPS,
    }
    if system.variant is not None:
        kwargs["batching"] = system.variant
    budget = system.max_num_batched_tokens or max_num_batched_tokens
    if budget is not None and preset.chunked_prefill:
        kwargs["max_num_batched_tokens"] = budget
    return kwargs


class EngineServer:
    """An `LLM` that serves workloads, measured from its own trace."""

    def __init__(self, llm: LLM, device_type: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self.llm = llm
        self.device_type = device_type
        self.sleep = sleep

    def run(self, requests: Sequence[BenchRequest]) -> Measured:
        """Serve the requests with an empty prefix cache and an empty trace. See `Measured`.

        Due requests are added before each step. With nothing to run, it sleeps until the next arrival.
        """
        engine = self.llm.engine
        reset_prefix_cache = getattr(self.llm, "reset_prefix_cache", None)  # if the milestone has one
        if reset_prefix_cache is not None:
            reset_prefix_cache()
        engine.trace.clear()
        engine.stats.reset()

        clock = engine.core.clock
        arrivals = Arrivals(requests, engine.config.max_num_seqs)
        start, idle = clock(), 0.0
        came: dict[int, float] = {}
        unfinished: set[str] = set()
        outputs: dict[str, RequestOutput] = {}
        while len(outputs) < len(requests):
            now = clock()
            for i in arrivals.due(now - start):
                # A request that arrived during a step has been waiting since then.
                came[i] = now if requests[i].start_after else start + requests[i].arrival
                self._add(i, requests[i])
                unfinished.add(str(i))
            if not unfinished:
                self.sleep(arrivals.wait(now - start))
                idle += clock() - now
                continue
            for output in engine.step_for(unfinished, final_only=True):  # as `LLM.generate` does
                outputs[output.request_id] = output
                unfinished.discard(output.request_id)
            if arrivals.late:
                arrivals.progress.update({int(r.request_id): r.num_output for r in engine.trace[-1].requests})
        done = [outputs[str(i)] for i in range(len(requests))]
        measured = from_trace(engine.trace, self.device_type)
        record = {
            "max_num_seqs": engine.config.max_num_seqs,
            "stats": asdict(engine.stats),
            "phase_s": measured["phase_s"],
        }
        return Measured(
            arrivals=[came[i] for i in range(len(requests))],
            finished=max(o.metrics.token_times[-1] for o in done),
            token_ids=[o.outputs[0].token_ids for o in done],
            token_times=[o.metrics.token_times for o in done],
            kv_capacity_tokens=measured["kv_capacity_tokens"],
            kv_reserved_tokens=measured["kv_reserved_tokens"],
            kv_used_tokens=measured["kv_used_tokens"],
            padding_share=measured["padding_share"],
            kv_padding_share=measured["kv_padding_share"],
            forward_seconds=measured["forward_seconds"],
            idle_seconds=idle,
            extra={"engine": record, **arrivals.note},
        )

    def _add(self, index: int, request: BenchRequest) -> None:
        params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
        self.llm.engine.add_request(str(index), request.prompt_token_ids, params)


def from_trace(trace: Trace, device_type: str) -> dict[str, Any]:
    """K/V, padding and times from an engine's trace, under the names of `Measured`.

    On a GPU the forward only launches kernels and "sample" waits for them, so both count as the forward.
    Raises RuntimeError for a trace that is empty or has lost steps.
    """
    if trace.dropped or not len(trace):
        raise RuntimeError(f"a trace of {len(trace)} steps with {trace.dropped} dropped cannot be summed")
    phase_s = {name: sum(s.phases[name][1] - s.phases[name][0] for s in trace) for name in PHASES}
    padding = sum(s.padding_tokens for s in trace)
    computed = sum(s.num_scheduled_tokens for s in trace)
    kv_padding = sum(s.padding_kv_tokens for s in trace)
    kv_seen = sum(r.num_computed for s in trace for r in s.requests)  # the new tokens' K/V included
    return {
        "kv_capacity_tokens": max(s.kv.capacity for s in trace),
        "kv_reserved_tokens": max(s.kv.reserved for s in trace),
        "kv_used_tokens": max(s.kv.used for s in trace),
        "padding_share": padding / (padding + computed),
        "kv_padding_share": kv_padding / (kv_padding + kv_seen),
        "forward_seconds": phase_s["forward"] + (phase_s["sample"] if device_type == "cuda" else 0.0),
        "phase_s": phase_s,
    }
