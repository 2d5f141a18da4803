"""LLMEngine: text in, text out, around a core that sees token ids only (vLLM: `vllm/v1/engine/llm_engine.py`).

prompt -tokenizer-> Request(s) -> core.step() -> EngineCoreOutput -detokenizer-> RequestOutput
                                     ^                          |
                                     +---- stop string found ---+
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from folovllm.checks import invalid
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.engine.factory import EngineParts, build_engine
from folovllm.engine.input_processor import Prompt, as_prompt_list, broadcast_params, read_prompt
from folovllm.engine.output_processor import ParentRequest, RequestState
from folovllm.engine.retry import reason_of
from folovllm.engine.trace import EngineStats, StepTrace, Trace
from folovllm.messages import EngineCoreOutput
from folovllm.outputs import RequestMetrics, RequestOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

Params = SamplingParams | Sequence[SamplingParams] | None
TOKENIZER_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError)


@dataclass
class Submission:
    """A checked prompt: the frontend's part of it, and the core's requests, one per sample."""

    user: ParentRequest
    requests: list[Request]


class LLMEngine:
    """An engine that the caller steps.

    It takes single configurations or one `EngineConfig`. Raises ValueError for settings that cannot work, before
    weights are loaded where that can be known.
    """

    def __init__(
        self,
        model_config: ModelConfig | None = None,
        scheduler_config: SchedulerConfig | None = None,
        cache_config: CacheConfig | None = None,
        *,
        engine_config: EngineConfig | None = None,
        parts: EngineParts | None = None,
    ) -> None:
        given = (model_config, scheduler_config, cache_config)
        if engine_config is not None and any(c is not None for c in given):
            raise ValueError("engine_config was given with other configurations; allowed: one or the other")
        self.config = engine_config or EngineConfig(
            model=model_config or ModelConfig(),
            scheduler=scheduler_config or SchedulerConfig(),
            cache=cache_config or CacheConfig(),
        )
        built = parts or build_engine(self.config)
        self.core = built.core
        self.tokenizer = built.tokenizer
        self.eos_token_ids = built.eos_token_ids
        self.vocab_size = built.vocab_size
        self.max_model_len = built.max_model_len
        self.defaults = built.defaults  # sampling parameters of requests without any
        self._has_warned = False  # that explicit parameters override some of these
        self._parent_requests: dict[str, ParentRequest] = {}
        self._request_states: dict[str, tuple[ParentRequest, RequestState]] = {}  # by the core's request id
        self._undelivered: dict[str, RequestOutput] = {}  # completed in a step for other requests
        self._stems: Counter[str] = Counter()  # of the ids in `_parent_requests`
        self._next_id = 0
        self.on_step: Callable[[StepTrace], None] | None = None  # called last; may raise

    @property
    def trace(self) -> Trace:
        """The record of each step."""
        return self.core.trace

    @property
    def stats(self) -> EngineStats:
        """Sums over all steps."""
        return self.core.stats

    # ------------------------------------------------------------------ requests in

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queue one prompt. Raises ValueError, with nothing queued, if anything about it is invalid."""
        self.submit([self.prepare(request_id, prompt, sampling_params, priority)])

    def enqueue(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, priority: Sequence[int] | int = 0
    ) -> list[str]:
        """Check all prompts, then queue them; returns request ids. Raises ValueError with nothing queued."""
        prompt_list = as_prompt_list(prompts)
        params = broadcast_params(sampling_params, len(prompt_list))
        priorities = list(priority) if isinstance(priority, (list, tuple)) else [priority] * len(prompt_list)
        if len(priorities) != len(prompt_list):
            raise invalid("priority", priority, f"one integer or a list of {len(prompt_list)}")
        each = zip(prompt_list, params, cast("list[int]", priorities), strict=True)
        submissions = [self.prepare(self.next_request_id(), prompt, sp, rank) for prompt, sp, rank in each]
        self.submit(submissions)
        return [s.user.request_id for s in submissions]

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        parent_id: str | None = None,
        hold: bool = False,
    ) -> Submission:
        """Check a prompt and its parameters and make its requests, without queueing them.

        parent_id: a held request to fork, whose tokens are the prompt without its last one. hold: keep this one's K/V
        when it has finished, until `scheduler.free_held`. Both are for one sequence (n = 1).
        """
        arrival = self.core.clock()
        params = self.defaults.params if sampling_params is None else sampling_params
        self._check(request_id, params, priority)
        if sampling_params is not None:
            self._warn_of_overrides(params)
        given = read_prompt(prompt, self.tokenizer, self.vocab_size)
        max_model_len = self.max_model_len
        if params.max_tokens is None:  # it ends where the KV cache ends, unless its prompt alone is longer
            longest = max(self.core.scheduler.kv.longest_request, len(given.token_ids) + 1)
            max_model_len = min(max_model_len, longest)
        sequence_ids = [request_id] if params.n == 1 else [f"{request_id}/{i}" for i in range(params.n)]
        requests = [
            Request(
                request_id=sequence_id,
                prompt_token_ids=given.token_ids,
                sampling_params=params if params.n == 1 else params.child(i),
                eos_token_ids=self.eos_token_ids,
                max_model_len=max_model_len,
                arrival_time=arrival,
                priority=priority,
                parent_id=parent_id if i == 0 else sequence_ids[0],
                hold=hold,
                cache_salt=given.cache_salt,
            )
            for i, sequence_id in enumerate(sequence_ids)
        ]
        self.core.check_can_run(requests[0])
        sequences = [
            RequestState(r.request_id, i, r.sampling_params, given.token_ids, self.tokenizer)
            for i, r in enumerate(requests)
        ]
        user = ParentRequest(request_id, given.text, given.token_ids, sequences, RequestMetrics(arrival))
        return Submission(user, requests)

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Queue prepared prompts, all or none. Raises ValueError if an id is in use."""
        taken: set[str] = set()  # by submissions that come before in the list
        for submission in submissions:
            user_id = submission.user.request_id
            ids = {user_id, *(r.request_id for r in submission.requests)}
            scheduled = self.core.scheduler.is_known
            if self.is_live(user_id) or any(i in taken or i in self._request_states or scheduled(i) for i in ids):
                raise ValueError(f"request_id={user_id!r} is in use; allowed: an id of no unfinished request")
            taken |= ids
        for submission in submissions:
            self._parent_requests[submission.user.request_id] = submission.user
            self._stems[stem(submission.user.request_id)] += 1
            for request, sequence in zip(submission.requests, submission.user.sequences, strict=True):
                self._request_states[request.request_id] = (submission.user, sequence)
                self.core.add_request(request)

    def next_request_id(self) -> str:
        """An unused id, also as the first part of one ("7" of "7/0"): "0", "1", ..."""
        while str(self._next_id) in self._stems or self.is_live(str(self._next_id)):
            self._next_id += 1
        self._next_id += 1
        return str(self._next_id - 1)

    def is_live(self, request_id: str) -> bool:
        """Whether a request is unfinished, or its final output not yet returned."""
        return request_id in self._parent_requests or request_id in self._undelivered

    def abort_request(self, request_id: str | Iterable[str]) -> list[RequestOutput]:
        """End requests now and free what they hold; returns their outputs so far. Unknown ids are ignored."""
        if not isinstance(request_id, Iterable):
            raise invalid("request_id", request_id, "a string or a list of strings")
        request_ids = [request_id] if isinstance(request_id, str) else list(dict.fromkeys(request_id))
        users = [self._parent_requests[i] for i in request_ids if i in self._parent_requests]
        self.core.abort_requests([s.request_id for user in users for s in user.sequences])
        for user in users:
            for sequence in user.sequences:
                sequence.abort()
        ended = [self._undelivered.pop(i) for i in request_ids if i in self._undelivered]
        return ended + self._outputs(users, final_only=False)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._parent_requests or self._undelivered)

    # ------------------------------------------------------------------ one step

    def step(self) -> list[RequestOutput]:
        """Run one step; the output so far of every request with new tokens."""
        return self.step_for(None, final_only=False)

    def step_for(self, request_ids: Collection[str] | None, final_only: bool) -> list[RequestOutput]:
        """Run one step and return the outputs of some requests (None: of all), or only the final ones.

        Other requests run in the step, too. Their final outputs are kept for the next call that asks for them. If a
        step for others has completed some of `request_ids`, their outputs are returned without a step.
        """
        if request_ids is not None and not self._undelivered.keys().isdisjoint(request_ids):
            return [self._undelivered.pop(i) for i in list(self._undelivered) if i in request_ids]
        has_work = self.core.has_unfinished_requests()
        outputs = self._step(final_only)
        ready = [] if request_ids is not None else list(self._undelivered.values())
        self._undelivered |= {o.request_id: o for o in outputs if o.finished}
        if has_work and self.on_step is not None and self.trace:
            self.on_step(self.trace[-1])  # if it raises, what has finished is returned by the next call
        wanted = [*ready, *(o for o in outputs if request_ids is None or o.request_id in request_ids)]
        for output in wanted:
            self._undelivered.pop(output.request_id, None)
        return wanted

    def _step(self, final_only: bool) -> list[RequestOutput]:
        outputs: list[EngineCoreOutput] = []
        try:
            outputs = self.core.step()
            return self._deliver(outputs, final_only)
        except BaseException:  # tokens of these requests may be lost
            self.core.abort_requests([output.request_id for output in outputs])
            self._undelivered |= {o.request_id: o for o in self._end_lost()}
            raise

    def _deliver(self, outputs: Sequence[EngineCoreOutput], final_only: bool) -> list[RequestOutput]:
        """Add new tokens to the users' outputs, and return those that have changed."""
        now = self.core.clock()
        moved: dict[str, ParentRequest] = {}
        stopped: list[str] = []
        for output in outputs:
            user, sequence = self._request_states[output.request_id]
            moved[user.request_id] = user
            try:
                ends = sequence.add(output)
            except TOKENIZER_ERRORS as error:
                ends = sequence.fail(reason_of(error))
            if ends:
                stopped.append(output.request_id)
            if sequence.index == 0:
                user.metrics.first_scheduled_time = output.first_scheduled_time
                user.metrics.token_times.extend([now] * len(output.new_token_ids))
                user.num_cached_tokens = output.num_cached_tokens
        if stopped:
            self.core.stop_requests(stopped)
        return self._outputs(list(moved.values()), final_only)

    def _end_lost(self) -> list[RequestOutput]:
        """End the sequences that the core aborted in a failed step; the outputs that this completes."""
        lost: dict[str, ParentRequest] = {}
        for sequence_id, (user, sequence) in self._request_states.items():
            if sequence.finish_reason is None and sequence_id not in self.core.scheduler.requests:
                sequence.abort()
                lost[user.request_id] = user
        return self._outputs(list(lost.values()), final_only=True)

    def generate_batch(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> dict[str, RequestOutput]:
        """Run prompts to completion; outputs by request id, in the order of the prompts.

        Raises ValueError, with nothing queued, if any prompt is invalid. Requests that were queued before run, too.
        """
        return self.run_to_completion(self.enqueue(prompts, sampling_params))

    def run_to_completion(
        self, request_ids: Sequence[str], on_done: Callable[[RequestOutput], None] = lambda output: None
    ) -> dict[str, RequestOutput]:
        """Step until these requests are complete; outputs by id, in the given order. `on_done` is called with each.

        A request that another caller aborts or receives meanwhile is left out. If this call is interrupted, it aborts
        all of them. Raises ValueError for an id that the engine does not have.
        """
        unfinished = set(request_ids)
        self.check_live(unfinished)
        done: dict[str, RequestOutput] = {}
        try:
            for request_id in request_ids:  # in turn, so that no step looks at all unfinished ones
                while request_id in unfinished and self.is_live(request_id):
                    for output in self.step_for(unfinished, final_only=True):
                        unfinished.discard(output.request_id)
                        done[output.request_id] = output
                        on_done(output)
                unfinished.discard(request_id)
        finally:
            self.abort_request(sorted(unfinished))
        return {i: done[i] for i in request_ids if i in done}

    def check_live(self, request_ids: Iterable[str]) -> None:
        """Raise ValueError for an id that the engine does not have."""
        unknown = sorted({i for i in request_ids if not self.is_live(i)})
        if unknown:
            raise ValueError(f"request_ids={unknown} are unknown; allowed: ids of requests that were added")

    def _outputs(self, users: list[ParentRequest], final_only: bool) -> list[RequestOutput]:
        outputs = []
        now = self.core.clock()
        for user in users:
            if user.finished:
                user.metrics.finished_time = now
                self._forget(user)
            if user.finished or not final_only:
                outputs.append(user.output())
        return outputs

    def _forget(self, user: ParentRequest) -> None:
        del self._parent_requests[user.request_id]
        for sequence in user.sequences:
            del self._request_states[sequence.request_id]
        first = stem(user.request_id)
        self._stems[first] -= 1
        if not self._stems[first]:
            del self._stems[first]

    def _warn_of_overrides(self, params: SamplingParams) -> None:
        """Say once what explicit parameters override of the model's generation_config.json."""
        overridden = [] if self._has_warned else self.defaults.overridden_by(params)
        if overridden:
            self._has_warned = True
            logger.warning(
                "explicit sampling parameters override %s of the generation_config.json of model=%r",
                ", ".join(overridden),
                self.config.model.model,
            )

    def _check(self, request_id: str, params: SamplingParams, priority: int) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise invalid("request_id", request_id, "a non-empty string")
        if not isinstance(params, SamplingParams):
            raise invalid("sampling_params", params, "a SamplingParams or None")
        params.check_vocab(self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise invalid("stop", params.stop, "none, because the model has no tokenizer")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise invalid("priority", priority, "an integer")
        policy = self.config.scheduler.scheduling_policy
        if priority != 0 and policy != "priority":
            raise invalid("priority", priority, f"0, because scheduling_policy is {policy!r}")


def stem(request_id: str) -> str:
    """The part before the first "/": the same for a request and for each of its samples, "7", "7/0", "7/1", ..."""
    return request_id.split("/")[0]
