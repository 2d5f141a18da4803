"""One forward on flattened tokens and paged K/V: prefills and decodes of all requests in one (M3, M4).

A request is a range of the step's token axis, and its K/V stays in its blocks: nothing is padded, and nothing is copied
when requests join or leave the batch. Compare vLLM's `vllm/v1/worker/gpu_model_runner.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend
from folovllm.messages import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from folovllm.models.paged_model import PagedModel
from folovllm.outputs import Logprob
from folovllm.runner.input_batch import InputBatch, ModelInput
from folovllm.runner.interface import ModelRunner
from folovllm.runner.kv_storage import KVStorage
from folovllm.runner.sampling_states import PROMPT_ROWS, SamplingStates
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
        logits, prompt_logprobs = (None, {}) if batch is None else self._forward(batch, step.scheduled)
        forwarded = self.clock()
        result = self.states.sample(step.scheduled, logits)
        result.prompt_logprobs = prompt_logprobs
        result.forwards = int(batch is not None)
        result.padding_tokens = 0 if batch is None else batch.padding_tokens
        result.phases = {
            "prepare": (start, prepared),
            "forward": (prepared, forwarded),
            "sample": (forwarded, self.clock()),
        }
        return result

    def _forward(
        self, batch: ModelInput, scheduled: list[ScheduledRequest]
    ) -> tuple[Tensor | None, dict[str, list[Mapping[int, Logprob]]]]:
        """Logits of the rows that sample, [N, V], None if none do; and the log probabilities of prompts."""
        hidden = self.model(
            batch.token_ids, batch.positions, self.storage.layers, batch.metadata, self.backend
        )  # [T, E]
        prompt_logprobs = self._prompt_logprobs(hidden, scheduled)
        if len(batch.sample_rows) == 0:
            # Without sampling nothing waits for the device, and the next step could overwrite inputs still being sent.
            if hidden.is_cuda:
                torch.cuda.current_stream(hidden.device).synchronize()
            return None, prompt_logprobs
        return self.model.logits(hidden[batch.sample_rows]), prompt_logprobs

    def _prompt_logprobs(
        self, hidden: Tensor, scheduled: list[ScheduledRequest]
    ) -> dict[str, list[Mapping[int, Logprob]]]:
        """By request, the entries of its `prompt_rows`, from the step's hidden states [T, E]."""
        if not any(share.prompt_rows for share in scheduled):
            return {}
        asked: list[tuple[str, int]] = []  # request id and position
        rows: list[int] = []
        start = 0
        for share in scheduled:
            asked += [(share.request_id, position) for position in share.prompt_rows]
            rows += [start + position - share.start for position in share.prompt_rows]
            start += share.num_tokens
        found: dict[str, list[Mapping[int, Logprob]]] = {}
        for i in range(0, len(rows), PROMPT_ROWS):
            logits = self.model.logits(hidden[rows[i : i + PROMPT_ROWS]])  # [N, V]
            self.states.add_prompt_logprobs(found, asked[i : i + PROMPT_ROWS], logits)
        return found
