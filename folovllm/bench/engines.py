"""Runs a workload on a milestone of this engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from folovllm.bench.record import Measured
from folovllm.bench.systems import System
from folovllm.bench.workloads import BenchRequest, longest
from folovllm.config import MILESTONES
from folovllm.engine.trace import PHASES, Trace
from folovllm.entrypoints.llm import LLM
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams

TRACE_STEPS = 1_000_000  # more than any workload takes: a dropped step would be missing from the sums


def engine_kwargs(
    system: System, requests: Sequence[BenchRequest], max_num_batched_tokens: int | None = None
) -> dict[str, Any]:
    """The keywords of `LLM` that this milestone takes for this workload.

    Room for all requests at once where the milestone runs more than one, and the model length that they need. A token
    budget is given to milestones that can split a prompt; to others it would only refuse long ones.
    """
    if system.milestone is None:
        raise ValueError(f"system={system.name!r} is not valid; allowed: a milestone")
    preset = MILESTONES[system.milestone]
    limit = preset.max_num_seqs_limit
    kwargs: dict[str, Any] = {
        "milestone": system.milestone,
        "max_model_len": longest(requests),
        "max_num_seqs": len(requests) if limit is None else min(limit, len(requests)),
        "max_trace_steps": TRACE_STEPS,
    }
    if system.variant is not None:
        kwargs["batching"] = system.variant
    if max_num_batched_tokens is not None and preset.chunked_prefill:
        kwargs["max_num_batched_tokens"] = max_num_batched_tokens
    return kwargs


class EngineServer:
    """An `LLM` that serves workloads; what it did is read from its own trace afterwards."""

    def __init__(self, llm: LLM, device_type: str) -> None:
        self.llm = llm
        self.device_type = device_type

    def run(self, requests: Sequence[BenchRequest]) -> Measured:
        """Serve the requests, from an empty prefix cache and with a clean record. See `Measured`."""
        engine = self.llm.engine
        reset_prefix_cache = getattr(self.llm, "reset_prefix_cache", None)  # where the milestone has such a cache
        if reset_prefix_cache is not None:
            reset_prefix_cache()
        engine.trace.clear()
        engine.stats.reset()

        arrival = Arrival(requests, engine.config.max_num_seqs)
        for i in arrival.first:
            self._add(i, requests[i])
        unfinished = {str(i) for i in range(len(requests))}
        outputs: dict[str, RequestOutput] = {}
        while unfinished:
            for output in engine.step_for(unfinished, final_only=True):  # as `LLM.generate` does
                outputs[output.request_id] = output
                unfinished.discard(output.request_id)
            if arrival.late:
                arrival.progress.update({int(r.request_id): r.num_output for r in engine.trace[-1].requests})
                for i in arrival.due():
                    self._add(i, requests[i])
        done = [outputs[str(i)] for i in range(len(requests))]
        measured = from_trace(engine.trace, self.device_type)
        return Measured(
            arrivals=[o.metrics.arrival_time for o in done],
            finished=max(o.metrics.token_times[-1] for o in done),
            token_ids=[o.outputs[0].token_ids for o in done],
            token_times=[o.metrics.token_times for o in done],
            kv_capacity_tokens=measured["kv_capacity_tokens"],
            kv_reserved_tokens=measured["kv_reserved_tokens"],
            kv_used_tokens=measured["kv_used_tokens"],
            padding_share=measured["padding_share"],
            forward_seconds=measured["forward_seconds"],
            extra={"engine": {"stats": asdict(engine.stats), "phase_s": measured["phase_s"]}, **arrival.note},
        )

    def _add(self, index: int, request: BenchRequest) -> None:
        params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
        self.llm.engine.add_request(str(index), request.prompt_token_ids, params)


class Arrival:
    """When a late request comes: once all that were there from the start have `start_after` output tokens each.

    A system that cannot run them all at once never has them at that point together. For it the rule is that they have
    as many tokens in all, `start_after` times their number, so that the same work is done by then.
    """

    def __init__(self, requests: Sequence[BenchRequest], max_num_seqs: int | None = None) -> None:
        self.first = [i for i, r in enumerate(requests) if r.start_after == 0]
        self.late = {i: r.start_after for i, r in enumerate(requests) if r.start_after > 0}
        fewest = min((requests[i].max_tokens for i in self.first), default=0)
        for i, start_after in self.late.items():
            if start_after > fewest:
                raise ValueError(
                    f"requests[{i}].start_after={start_after} is not valid; allowed: at most {fewest}, which all "
                    "requests that are there from the start reach"
                )
        self.progress = dict.fromkeys(self.first, 0)  # request -> output tokens
        self.rule = "together" if max_num_seqs is not None and max_num_seqs < len(self.first) else "each"
        self.note = {"arrival_rule": self.rule} if self.late else {}

    def due(self) -> list[int]:
        """The late requests whose time has come; each is named once."""
        counts = [self.progress[i] for i in self.first]
        reached = min(counts) if self.rule == "each" else sum(counts) / len(counts)
        due = [i for i, start_after in self.late.items() if reached >= start_after]
        for i in due:
            del self.late[i]
        return due


def from_trace(trace: Trace, device_type: str) -> dict[str, Any]:
    """What an engine's own record says of K/V, padding and time, under the names of `Measured`.

    On a GPU the forward only starts kernels and "sample" waits for them, so there both count as the forward.
    Raises RuntimeError for a trace that is empty or has lost steps.
    """
    if trace.dropped or not len(trace):
        raise RuntimeError(f"a trace of {len(trace)} steps that lost {trace.dropped} cannot be summed")
    phase_s = {name: sum(s.phases[name][1] - s.phases[name][0] for s in trace) for name in PHASES}
    padding = sum(s.padding_tokens for s in trace)
    computed = sum(s.num_scheduled_tokens for s in trace)
    return {
        "kv_capacity_tokens": max(s.kv.capacity for s in trace),
        "kv_reserved_tokens": max(s.kv.reserved for s in trace),
        "kv_used_tokens": max(s.kv.used for s in trace),
        "padding_share": padding / (padding + computed),
        "forward_seconds": phase_s["forward"] + (phase_s["sample"] if device_type == "cuda" else 0.0),
        "phase_s": phase_s,
    }
