"""The interface of a runner: run a step, return the sampled tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

from folovllm.messages import ModelRunnerOutput, SchedulerOutput


class ModelRunner(ABC):
    """Owns the weights, the K/V and the sampling state of live requests."""

    @abstractmethod
    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Apply `kv_ops`, drop `finished_req_ids`, add `scheduled_new_reqs`, then compute and sample `scheduled`.

        `scheduled` may be empty.
        """
