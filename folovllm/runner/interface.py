"""The interface of a runner: run a step, return the sampled tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

from folovllm.messages import ModelRunnerOutput, SchedulerOutput


class ModelRunner(ABC):
    """Owns the weights, the K/V and the sampling state of live requests."""

    def update_states(self, step: SchedulerOutput) -> None:
        """Apply `kv_ops`, drop `finished_req_ids`, add `scheduled_new_reqs`: once per step, before the forward.

        A step may have nothing else to do. (A forward may have to be repeated. A swap may not: by then its source may
        hold other K/V.)
        """
        return

    @abstractmethod
    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute and sample `scheduled`, after `update_states`.

        If it raises, it can be called again for these requests, together or apart, and gives what it would have given:
        the same slots are written again, and random streams and counts advance only with a result.
        """
