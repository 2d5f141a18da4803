"""What the core asks of a runner: run this step, return what was sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from folovllm.sampling.sampler import Logprob
from folovllm.scheduler.output import SchedulerOutput


@dataclass
class RunnerOutput:
    """One list of sampled ids per scheduled request, in the scheduler's order: empty for a chunk that samples nothing.

    logprobs: per request, one dict per sampled token, or None where none were asked for.
    failed: request id -> why nothing could be sampled for it; its list of ids is empty.
    phases: (start, end) seconds of "prepare", "forward" and "sample" on the clock the runner was given.
    forwards: model calls made. padding_tokens: new tokens computed for nobody. padding_kv_tokens: columns of K/V that
    stood in a batch for nobody and were masked, over all forwards.
    """

    sampled_token_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[dict[int, Logprob]] | None] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    forwards: int = 0
    padding_tokens: int = 0
    padding_kv_tokens: int = 0


class ModelRunner(ABC):
    """Owns the tensors: weights, K/V, and the sampling state of live requests."""

    @abstractmethod
    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """Do `kv_ops` in order, forget `finished_ids`, learn `new_requests`, then compute and sample `scheduled`.

        A step with nothing scheduled is legal and only does the bookkeeping.
        """
