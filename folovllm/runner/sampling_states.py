"""The sampling part of every runner: each request's sampling state, and a step's new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from folovllm.messages import ModelRunnerOutput, NewRequestData, ScheduledRequest, SchedulerOutput
from folovllm.outputs import Logprob
from folovllm.sampling.batch import SamplingBatch, SamplingMetadata, SamplingState
from folovllm.sampling.logprobs import gather_logprobs
from folovllm.sampling.sampler import Sampler

# Rows of the prompt that the LM head computes at a time: a long prompt's logits can be larger than the model.
PROMPT_ROWS = 64
NO_CHOICE = "the logits leave no token to choose: they hold NaN or +inf, or logit_bias and min_tokens ban every token"


class SamplingStates:
    """The sampling state of every unfinished request, by id; preempted ones included.

    A repeated step changes nothing: which token a draw is for follows from its position, and what a step adds, the
    counts of its tokens, is added last.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._requests: dict[str, NewRequestData] = {}
        self._slots: dict[str, int] = {}  # of those that have sampled: their row in the batch
        self._batch: SamplingBatch | None = None  # made when the first logits say how wide they are
        self._selected: tuple[list[str], SamplingMetadata | None] = ([], None)  # of the step before

    def __len__(self) -> int:
        return len(self._requests)

    def update(self, step: SchedulerOutput) -> None:
        """Drop the states of finished requests and make those of new ones."""
        for request_id in step.finished_req_ids:
            self._requests.pop(request_id, None)
            if request_id in self._slots and self._batch is not None:
                self._batch.remove(self._slots.pop(request_id))
                self._selected = ([], None)
        for new in step.scheduled_new_reqs:
            self._requests.setdefault(new.request_id, new)

    def sample(self, scheduled: list[ScheduledRequest], logits: Tensor | None) -> ModelRunnerOutput:
        """One token for each share that samples, from logits [N, V], a row per such share in order."""
        result = ModelRunnerOutput(sampled_token_ids=[[] for _ in scheduled], logprobs=[None] * len(scheduled))
        sampling = [i for i, share in enumerate(scheduled) if share.samples]
        if logits is None or not sampling:
            return result
        batch = self._batch = self._batch or SamplingBatch(logits.device, logits.shape[-1])
        request_ids = [scheduled[i].request_id for i in sampling]
        rows = self._select(batch, request_ids)
        num_output = [
            scheduled[i].start + scheduled[i].num_tokens - len(self._requests[scheduled[i].request_id].prompt_token_ids)
            for i in sampling
        ]
        out = self.sampler(logits, rows, num_output)
        for i, token_id, logprobs in zip(sampling, out.token_ids, out.logprobs, strict=True):
            result.sampled_token_ids[i] = [token_id]
            result.logprobs[i] = None if logprobs is None else [logprobs]
        for row in out.bad_rows:
            result.failed[request_ids[row]] = NO_CHOICE
            result.sampled_token_ids[sampling[row]] = []
        if (asked := rows.penalties) is not None:
            asked.counts.add(asked.slots, out.sampled[asked.rows])
        return result

    def add_prompt_logprobs(
        self, found: dict[str, list[Mapping[int, Logprob]]], rows: Sequence[tuple[str, int]], logits: Tensor
    ) -> None:
        """Add to `found`, by request, the entries of rows, (request id, position) each, from their logits, [N, V]."""
        news = [self._requests[request_id] for request_id, _ in rows]
        asked = {row: new.sampling_params.prompt_logprobs or 0 for row, new in enumerate(news)}
        next_ids = [new.prompt_token_ids[position + 1] for new, (_, position) in zip(news, rows, strict=True)]
        for row, entries in gather_logprobs(logits, asked, next_ids).items():
            found.setdefault(rows[row][0], []).append(entries)

    def _select(self, batch: SamplingBatch, request_ids: list[str]) -> SamplingMetadata:
        """The rows of these requests; those of the step before, if the requests are the same."""
        previous, rows = self._selected
        if rows is None or request_ids != previous:
            for request_id in request_ids:
                if request_id not in self._slots:
                    new = self._requests[request_id]
                    state = SamplingState(new.sampling_params, new.prompt_token_ids, (), new.stop_token_ids, new.seed)
                    self._slots[request_id] = batch.add(state)
            rows = batch.select([self._slots[request_id] for request_id in request_ids])
            self._selected = (request_ids, rows)
        return rows
