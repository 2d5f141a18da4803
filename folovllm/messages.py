"""What is said in a step: scheduler to runner, runner to scheduler, core to the outside. Plain, picklable data.

The parts of the core meet only in these (vLLM: `vllm/v1/core/sched/output.py`, `vllm/v1/outputs.py` and
`vllm/v1/engine/__init__.py`)::

    Scheduler.schedule -> SchedulerOutput -> ModelRunner.execute_model -> ModelRunnerOutput
    -> Scheduler.update_from_output -> EngineCoreOutput
"""

from __future__ import annotations

from dataclasses import dataclass, field

from folovllm.kv_cache.interface import KVOp, KVPlan
from folovllm.outputs import Logprob
from folovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class NewRequestData:
    """All that a runner will ever need to know of a request; sent once, with the request's very first step."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    stop_token_ids: frozenset[int]  # EOS included


@dataclass(frozen=True)
class ScheduledRequest:
    """One request's share of a step: compute `token_ids` at positions start, start + 1, ..."""

    request_id: str
    token_ids: list[int]
    start: int
    # Whether these are the last tokens known, so that the last row's logits give the next one. A chunk that stops
    # earlier computes K/V and samples nothing.
    samples: bool
    plan: KVPlan

    @property
    def num_tokens(self) -> int:
        """Tokens to compute in this step."""
        return len(self.token_ids)


@dataclass
class SchedulerOutput:
    """One step's work."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    scheduled_new_reqs: list[NewRequestData] = field(default_factory=list)
    kv_ops: list[KVOp] = field(default_factory=list)  # to be done in order before the forward
    finished_req_ids: list[str] = field(default_factory=list)  # the runner may forget them altogether
    preempted_req_ids: list[str] = field(default_factory=list)  # in this step
    resumed_req_ids: list[str] = field(default_factory=list)  # preempted earlier, running again
    total_num_scheduled_tokens: int = 0

    def add(self, share: ScheduledRequest) -> None:
        """Give a request a share of the step. Its plan's operations join the others."""
        self.scheduled.append(share)
        self.total_num_scheduled_tokens += share.num_tokens
        self.kv_ops.extend(share.plan.ops)

    def remove(self, request_id: str) -> None:
        """Take back a request's share, if it has one. The operations stay: they come before all that follow."""
        for index, share in enumerate(self.scheduled):
            if share.request_id == request_id:
                self.total_num_scheduled_tokens -= share.num_tokens
                del self.scheduled[index]
                return


@dataclass
class ModelRunnerOutput:
    """What a runner made of a step. The lists have one entry per scheduled request, in the scheduler's order."""

    sampled_token_ids: list[list[int]] = field(default_factory=list)  # empty for a chunk that samples nothing
    logprobs: list[list[dict[int, Logprob]] | None] = field(default_factory=list)  # None where none were asked for
    failed: dict[str, str] = field(default_factory=dict)  # request id -> why nothing could be sampled for it
    # (start, end) seconds of "prepare", "forward" and "sample", on the clock that the runner was given.
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    forwards: int = 0  # model calls
    padding_tokens: int = 0  # rows of padding among the new tokens
    padding_kv_tokens: int = 0  # padded columns of K/V, over all forwards


@dataclass(frozen=True)
class EngineCoreOutput:
    """What one step did for one request, in token ids."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    num_cached_tokens: int
    first_scheduled_time: float | None
