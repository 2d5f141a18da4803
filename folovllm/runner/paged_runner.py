"""One forward on flattened tokens and paged K/V: prefills and decodes of all requests in one (M3, M4).

A request is a range of the step's token axis, and its K/V stays in its blocks: nothing is padded, and nothing is copied
when requests join or leave the batch. Compare vLLM's `vllm/v1/worker/gpu_model_runner.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend
from folovllm.messages import ModelRunnerOutput, SchedulerOutput
from folovllm.models.paged_model import PagedModel
from folovllm.runner.input_batch import InputBatch, ModelInput
from folovllm.runner.interface import ModelRunner
from folovllm.runner.kv_storage import KVStorage
from folovllm.runner.sampling_states import SamplingStates
from folovllm.runner.threads import cpu_threads
from folovllm.sampling.sampler import Sampler


class PagedRunner(ModelRunner):
    """Runs a step as one forward of the model."""

    def __init__(
        self,
        model: PagedModel,
        storage: KVStorage,
        backend: AttentionBackend,
        sampler: Sampler,
        buffers: InputBatch,
        clock: Callable[[], float] = time.perf_counter,
        num_threads: int | None = None,
    ) -> None:
        self.model = model
        self.storage = storage
        self.backend = backend
        self.buffers = buffers
        self.clock = clock
        self.num_threads = num_threads
        self.states = SamplingStates(sampler)

    @torch.inference_mode()
    def update_states(self, step: SchedulerOutput) -> None:
        self.states.update(step)
        self.storage.apply(step.kv_ops, self.backend)

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        with cpu_threads(self.num_threads), torch.inference_mode():
            return self._execute(step)

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        start = self.clock()
        batch = self.buffers.fill(step.scheduled) if step.scheduled else None
        prepared = self.clock()
        logits = None if batch is None else self._forward(batch)
        forwarded = self.clock()
        result = self.states.sample(step.scheduled, logits)
        result.forwards = int(batch is not None)
        result.padding_tokens = 0 if batch is None else batch.padding_tokens
        result.phases = {
            "prepare": (start, prepared),
            "forward": (prepared, forwarded),
            "sample": (forwarded, self.clock()),
        }
        return result

    def _forward(self, batch: ModelInput) -> Tensor | None:
        """Logits of the rows that sample, [N, V]; None if none do."""
        hidden = self.model(
            batch.token_ids, batch.positions, self.storage.layers, batch.metadata, self.backend
        )  # [T, E]
        if len(batch.sample_rows) == 0:
            # Without sampling nothing waits for the device, and the next step could overwrite inputs still being sent.
            if hidden.is_cuda:
                torch.cuda.current_stream(hidden.device).synchronize()
            return None
        return self.model.logits(hidden[batch.sample_rows])
