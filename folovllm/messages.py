"""The messages of a step: scheduler to runner, runner to scheduler, core to engine. Plain, picklable data.

Each step passes these between the parts of the core (vLLM: `vllm/v1/core/sched/output.py`, `vllm/v1/outputs.py` and
`vllm/v1/engine/__init__.py`)::

    Scheduler.schedule -> SchedulerOutput -> ModelRunner.update_states, execute_model -> ModelRunnerOutput
    -> Scheduler.update_from_output -> EngineCoreOutput
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from folovllm.kv_cache.interface import KVOp, KVPlan
from folovllm.outputs import Logprob, PromptLogprobs
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class NewRequestData:
    """All that a runner needs to know of a request; sent once, in the request's first step."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    stop_token_ids: frozenset[int]  # EOS included
    seed: int = 0  # of its random numbers: the user's, or the request's own

    @classmethod
    def of(cls, request: Request) -> NewRequestData:
        """What `request` is at its first step."""
        params = request.sampling_params
        seed = request.own_seed if params.seed is None else params.seed
        return cls(request.request_id, request.prompt_token_ids, params, request.stop_token_ids, seed)


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
    prompt_rows: range = range(0)  # positions whose logits give a log probability of the prompt: the next token's

    @property
    def num_tokens(self) -> int:
        """Tokens to compute in this step."""
        return len(self.token_ids)


@dataclass
class SchedulerOutput:
    """The work of one step."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    scheduled_new_reqs: list[NewRequestData] = field(default_factory=list)
    kv_ops: list[KVOp] = field(default_factory=list)  # to be done in this order before the forward
    finished_req_ids: list[str] = field(default_factory=list)  # the runner may drop what it keeps for them
    preempted_req_ids: list[str] = field(default_factory=list)  # in this step
    resumed_req_ids: list[str] = field(default_factory=list)  # preempted earlier, running again
    total_num_scheduled_tokens: int = 0

    def add(self, share: ScheduledRequest) -> None:
        """Add a request's share, and its plan's operations."""
        self.scheduled.append(share)
        self.total_num_scheduled_tokens += share.num_tokens
        self.kv_ops.extend(share.plan.ops)

    def remove(self, request_id: str) -> None:
        """Take out a request's share, if it has one. Its operations stay: later ones may rely on them."""
        for index, share in enumerate(self.scheduled):
            if share.request_id == request_id:
                self.total_num_scheduled_tokens -= share.num_tokens
                del self.scheduled[index]
                return


@dataclass
class ModelRunnerOutput:
    """The result of a step. The lists have one entry per scheduled request, in the scheduler's order."""

    sampled_token_ids: list[list[int]] = field(default_factory=list)  # empty for a chunk that samples nothing
    logprobs: list[list[Mapping[int, Logprob]] | None] = field(default_factory=list)  # None where none were asked for
    # Request id -> the entries of its `prompt_rows`.
    prompt_logprobs: dict[str, list[Mapping[int, Logprob]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # request id -> why nothing could be sampled for it
    not_written: set[str] = field(default_factory=set)  # those of `failed` whose forward failed: their K/V is in doubt
    # Requests that did not run, because they read K/V of such ones. They have no entries in the lists.
    unread: list[str] = field(default_factory=list)
    # (start, end) seconds of "prepare", "forward" and "sample", on the clock that the runner was given.
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    forwards: int = 0  # model calls
    padding_tokens: int = 0  # rows of padding among the new tokens
    padding_kv_tokens: int = 0  # padded columns of K/V, over all forwards


@dataclass(frozen=True)
class EngineCoreOutput:
    """What one step gave one request, in token ids."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: list[Mapping[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    num_cached_tokens: int
    first_scheduled_time: float | None
    prompt_logprobs: PromptLogprobs | None = None  # all of them, with the first token

    @classmethod
    def of(
        cls, request: Request, token_ids: list[int], logprobs: list[Mapping[int, Logprob]] | None
    ) -> EngineCoreOutput:
        """The output of a request that has just got `token_ids`; `logprobs` may have entries for dropped ones, too."""
        is_later = request.num_output_tokens > len(token_ids)
        return cls(
            request.request_id,
            token_ids,
            None if logprobs is None else logprobs[: len(token_ids)],
            request.status.finish_reason,
            request.stop_reason,
            request.num_cached_tokens,
            request.first_scheduled_time,
            None if is_later or request.lacks_prompt_logprobs else request.prompt_logprobs,
        )
