"""LLMEngine: text in, text out, around a core that sees token ids only (vLLM: `vllm/v1/engine/llm_engine.py`).

prompt -tokenizer-> Request(s) -> core.step() -> EngineCoreOutput -detokenizer-> RequestOutput
                                     ^                          |
                                     +---- stop string found ---+
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from folovllm.checks import invalid
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.engine.engine_loop import EngineLoop, between_steps
from folovllm.engine.factory import EngineParts, build_engine
from folovllm.engine.input_processor import Prompt, as_prompt_list, broadcast_params, read_prompt
from folovllm.engine.outbox import Outbox
from folovllm.engine.output_processor import ParentRequest, RequestState
from folovllm.engine.request_checks import RequestChecks
from folovllm.engine.retry import reason_of
from folovllm.engine.trace import EngineStats, StepTrace, Trace
from folovllm.errors import ConfigError, InvalidRequestError, errors_as
from folovllm.messages import EngineCoreOutput
from folovllm.outputs import PromptLogprobs, RequestMetrics, RequestOutput
from folovllm.request import Request
from folovllm.sampling.noise import own_seed
from folovllm.sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None
TOKENIZER_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError)


@dataclass
class Submission:
    """A checked prompt: the frontend's part of it, and the core's requests, one per sample."""

    user: ParentRequest
    requests: list[Request]


class LLMEngine:
    """An engine that the caller steps.

    Several threads may call it: `step_for` hands every caller the outputs of its requests, even if another thread runs
    the steps (`engine_loop.py`). `step` takes those of all requests, so it is for programs where one thread has them
    all, as are `on_step` and `core`.

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
            raise ConfigError("engine_config was given with other configurations; allowed: one or the other")
        self.config = engine_config or EngineConfig(
            model=model_config or ModelConfig(),
            scheduler=scheduler_config or SchedulerConfig(),
            cache=cache_config or CacheConfig(),
        )
        with errors_as(ConfigError):
            built = parts or build_engine(self.config)
        self.core = built.core
        self.tokenizer = built.tokenizer
        self.eos_token_ids = built.eos_token_ids
        self.vocab_size = built.vocab_size
        self.max_model_len = built.max_model_len
        self.defaults = built.defaults  # sampling parameters of requests without any
        self.loop = EngineLoop()
        self._checks = RequestChecks(self.config, built)
        self._parent_requests: dict[str, ParentRequest] = {}
        self._request_states: dict[str, tuple[ParentRequest, RequestState]] = {}  # by the core's request id
        self._outbox = Outbox()  # from steps for other requests
        self._callers: Counter[int] = Counter()  # threads, by how many of `_parent_requests` they submitted
        self._stems: Counter[str] = Counter()  # of the ids in `_parent_requests`
        self._next_id = 0
        self._num_unseeded = 0  # requests so far that draw and brought no seed
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

    @errors_as(InvalidRequestError)
    @between_steps
    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queue one prompt. Raises ValueError, with nothing queued, if anything about it is invalid."""
        self.submit([self.prepare(request_id, prompt, sampling_params, priority)])

    @errors_as(InvalidRequestError)
    @between_steps
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

    @errors_as(InvalidRequestError)
    @between_steps
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
        params = self._checks.check(request_id, sampling_params, priority)
        given = read_prompt(prompt, self.tokenizer, self.vocab_size, params.prompt_limit(self.max_model_len))
        max_model_len = self.max_model_len
        if params.max_tokens is None:  # it ends where the KV cache ends, unless its prompt alone is longer
            longest = max(self.core.scheduler.kv.longest_request, len(given.token_ids) + 1)
            max_model_len = min(max_model_len, longest)
        sequence_ids = [request_id] if params.n == 1 else [f"{request_id}/{i}" for i in range(params.n)]
        prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
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
                prompt_logprobs=prompt_logprobs,
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

    @errors_as(InvalidRequestError)
    @between_steps
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
            submission.user.caller = threading.get_ident()
            self._callers[submission.user.caller] += 1
            for request, sequence in zip(submission.requests, submission.user.sequences, strict=True):
                self._request_states[request.request_id] = (submission.user, sequence)
                if request.sampling_params.seed is None and not request.sampling_params.is_greedy:
                    request.own_seed = own_seed(self.config.model.seed, self._num_unseeded)
                    self._num_unseeded += 1
                self.core.add_request(request)

    @between_steps
    def next_request_id(self) -> str:
        """An unused id, also as the first part of one ("7" of "7/0"): "0", "1", ..."""
        while str(self._next_id) in self._stems or self.is_live(str(self._next_id)):
            self._next_id += 1
        self._next_id += 1
        return str(self._next_id - 1)

    def is_live(self, request_id: str) -> bool:
        """Whether a request is unfinished, or its final output not yet returned."""
        return request_id in self._parent_requests or request_id in self._outbox

    @between_steps
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
        outputs = self._outbox.take(request_ids) + self._outputs(users, growing=None)
        self.loop.settle_followers()
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._parent_requests or self._outbox)

    # ------------------------------------------------------------------ one step

    def step(self) -> list[RequestOutput]:
        """Run one step; the output so far of every request with new tokens."""
        return self.step_for(None, final_only=False)

    def step_for(self, request_ids: Collection[str] | None, final_only: bool) -> list[RequestOutput]:
        """Run one step and return the outputs of some requests (None: of all), or only the final ones.

        Other requests run in the step, too, and their outputs are kept for the next call that asks for them. If a step
        for others, perhaps in another thread, has outputs of `request_ids`, they are returned without a step.
        """
        with self.loop.following(lambda: self._ready(request_ids, final_only)) as me:
            while self.loop.wait(me):
                with self.loop.lock, self.loop.leading(me, self._others_have_requests) as leads:
                    if leads:
                        me.outputs = self._step(request_ids, final_only)
        return me.result()

    def _others_have_requests(self) -> bool:
        return len(self._callers) > (threading.get_ident() in self._callers)

    def _ready(self, request_ids: Collection[str] | None, final_only: bool) -> list[RequestOutput] | Exception | None:
        """Outputs that earlier steps left for these requests, or the error that ended one. None if a step is needed."""
        if request_ids is None:
            return None
        if (error := self._outbox.take_failure(request_ids)) is not None:
            return error
        outputs = self._outbox.take_of(request_ids)
        if not final_only:
            grown = [self._parent_requests[i] for i in self._outbox.grown_of(request_ids)]
            outputs += self._outputs(grown, request_ids)
        if outputs or not request_ids or any(map(self.is_live, request_ids)):
            return outputs or None
        return []  # others have aborted or received all of them

    def _step(self, request_ids: Collection[str] | None, final_only: bool) -> list[RequestOutput]:
        has_work = self.core.has_unfinished_requests()
        news: list[EngineCoreOutput] = []
        try:
            news = self.core.step()
            outputs = self._process(news, () if final_only else request_ids)
        except BaseException as error:
            try:
                if news:  # their tokens may be lost
                    self.core.abort_requests([output.request_id for output in news])
            finally:
                self._outbox.put(self._end_lost(), error)
            mine = self._outbox.take_failure(request_ids)
            if mine is None and isinstance(error, Exception) and self._outbox.other_caller_fails(error):
                return []  # it ended requests of others
            raise
        ready = [] if request_ids is not None else self._outbox.take(list(self._outbox.finished))
        self._outbox.put([o for o in outputs if o.finished])
        if has_work and self.on_step is not None and self.trace:
            self.on_step(self.trace[-1])  # if it raises, what has finished is returned by the next call
        wanted = [*ready, *(o for o in outputs if request_ids is None or o.request_id in request_ids)]
        self._outbox.take(o.request_id for o in wanted)
        return wanted

    def _process(self, news: list[EngineCoreOutput], growing: Container[str] | None) -> list[RequestOutput]:
        """A step's tokens as text: outputs of requests that have finished, or have new tokens and are in `growing`."""
        now = self.core.clock()
        moved: dict[str, ParentRequest] = {}
        stopped: list[str] = []
        for output in news:
            user, sequence = self._request_states[output.request_id]
            moved[user.request_id] = user
            try:
                user.add_prompt_logprobs(output, self.tokenizer)
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
        self._outbox.grown |= dict.fromkeys(moved)
        return self._outputs(list(moved.values()), growing)

    def _end_lost(self) -> list[RequestOutput]:
        """End the sequences that the core aborted in a failed step; the outputs that this completes."""
        lost: dict[str, ParentRequest] = {}
        for sequence_id, (user, sequence) in self._request_states.items():
            if sequence.finish_reason is None and sequence_id not in self.core.scheduler.requests:
                sequence.abort()
                lost[user.request_id] = user
        return self._outputs(list(lost.values()), growing=())

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

    def _outputs(self, users: list[ParentRequest], growing: Container[str] | None) -> list[RequestOutput]:
        """Outputs of those that have finished, and of the others in `growing` (None: of all)."""
        outputs = []
        now = self.core.clock()
        for user in users:
            if user.finished:
                user.metrics.finished_time = now
                self._forget(user)
            if user.finished or growing is None or user.request_id in growing:
                self._outbox.grown.pop(user.request_id, None)
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
        self._callers[user.caller] -= 1
        if not self._callers[user.caller]:
            del self._callers[user.caller]


def stem(request_id: str) -> str:
    """The part before the first "/": the same for a request and for each of its samples, "7", "7/0", "7/1", ..."""
    return request_id.split("/")[0]
