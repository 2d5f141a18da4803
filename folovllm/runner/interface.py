"""What the core asks of a runner: run this step, return what was sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod

from folovllm.messages import ModelRunnerOutput, SchedulerOutput


class ModelRunner(ABC):
    """Owns the tensors: weights, K/V, and the sampling state of live requests."""

    @abstractmethod
    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Do `kv_ops`, forget `finished_req_ids`, learn `scheduled_new_reqs`, then compute and sample `scheduled`.

        A step with nothing scheduled is legal and only does the bookkeeping.
        """
