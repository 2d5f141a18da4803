"""What the scheduler tells the runner in each step: plain, picklable data (vLLM: `vllm/v1/core/sched/output.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from folovllm.kv_cache.interface import KVOp, KVPlan
from folovllm.sampling.sampler import Logprob
from folovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class NewRequest:
    """All a runner will ever need to know of a request; sent once, with the request's very first step."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    stop_token_ids: frozenset[int]


@dataclass(frozen=True)
class ScheduledRequest:
    """One request's share of a step: compute `token_ids` at positions start, start + 1, ...

    samples: True when these are the last tokens known, so that the last row's logits give the next one. A chunk that
    stops earlier computes K/V and samples nothing.
    """

    request_id: str
    token_ids: list[int]
    start: int
    samples: bool
    plan: KVPlan

    @property
    def num_tokens(self) -> int:
        """Tokens to compute in this step."""
        return len(self.token_ids)


@dataclass
class SchedulerOutput:
    """One step's work. `kv_ops` are done in order before the forward; `finished_ids` may be forgotten altogether.

    preempted_ids: those that gave way. resumed_ids: those that gave way in an earlier step and run again from this one.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    kv_ops: list[KVOp] = field(default_factory=list)
    finished_ids: list[str] = field(default_factory=list)
    preempted_ids: list[str] = field(default_factory=list)
    resumed_ids: list[str] = field(default_factory=list)
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


@dataclass(frozen=True)
class CoreOutput:
    """What one step did for one request, in token ids (vLLM: `EngineCoreOutput`)."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    num_cached_tokens: int
    first_scheduled_time: float | None
