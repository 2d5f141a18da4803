"""The sampling part of every runner: each request's sampling state, and a step's new tokens."""

from __future__ import annotations

from torch import Tensor

from folovllm.messages import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from folovllm.sampling.sampler import Sampler, SamplingState

NO_CHOICE = "the logits leave no token to choose: they hold NaN or +inf, or logit_bias and min_tokens ban every token"


class SamplingStates:
    """The sampling state of every unfinished request, by id; preempted ones included."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._states: dict[str, SamplingState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def update(self, step: SchedulerOutput) -> None:
        """Drop the states of finished requests and make those of new ones."""
        for request_id in step.finished_req_ids:
            self._states.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            generator = self.sampler.make_generator(new.sampling_params)
            self._states[new.request_id] = SamplingState(
                new.sampling_params, new.prompt_token_ids, [], new.stop_token_ids, generator
            )

    def sample(self, scheduled: list[ScheduledRequest], logits: Tensor | None) -> ModelRunnerOutput:
        """One token for each share that samples, from logits [N, V], a row per such share in order."""
        result = ModelRunnerOutput(sampled_token_ids=[[] for _ in scheduled], logprobs=[None] * len(scheduled))
        sampling = [i for i, share in enumerate(scheduled) if share.samples]
        if logits is None or not sampling:
            return result
        states = [self._states[scheduled[i].request_id] for i in sampling]
        streams = [self.sampler.generator, *(state.generator for state in states if state.generator is not None)]
        saved = [] if all(state.params.is_greedy for state in states) else [(s, s.get_state()) for s in streams]
        try:
            out = self.sampler(logits, states)
        except BaseException:
            for stream, before in saved:
                stream.set_state(before)  # a repeat draws the same numbers
            raise
        result.failed = {scheduled[sampling[row]].request_id: NO_CHOICE for row in out.bad_rows}
        for i, state, token_id, logprobs in zip(sampling, states, out.token_ids, out.logprobs, strict=True):
            if scheduled[i].request_id in result.failed:
                continue
            state.output_token_ids.append(token_id)
            result.sampled_token_ids[i] = [token_id]
            result.logprobs[i] = None if logprobs is None else [logprobs]
        return result
