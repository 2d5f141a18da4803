"""LLM: prompts in, completions out, in one call (vLLM: `vllm/entrypoints/llm.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from folovllm.checks import invalid
from folovllm.config import EngineConfig
from folovllm.engine.beam_search import beam_search
from folovllm.engine.input_processor import Prompt, as_prompt_list, encode
from folovllm.engine.llm_engine import LLMEngine, Params
from folovllm.engine.recording import record
from folovllm.entrypoints.chat import ChatOptions, Message, conversations_of, render
from folovllm.errors import ConfigError, InvalidRequestError, errors_as
from folovllm.outputs import BeamSearchOutput, RequestOutput
from folovllm.sampling_params import BeamSearchParams, SamplingParams


class OutputStream(Iterator[RequestOutput]):
    """Growing outputs of requests, in the order of the engine's steps. Raises ValueError for an unknown id.

    Not a generator: one that is dropped before its first `next` would never abort its requests.
    """

    def __init__(self, engine: LLMEngine, request_ids: Sequence[str]) -> None:
        self._engine = engine
        self._unfinished: set[str] = set()
        self._ready: deque[RequestOutput] = deque()
        engine.check_live(request_ids)
        self._unfinished.update(request_ids)

    def __next__(self) -> RequestOutput:
        # Another thread may have aborted or finished some of them.
        while not self._ready and any(map(self._engine.is_live, self._unfinished)):
            try:
                self._ready.extend(self._engine.step_for(self._unfinished, final_only=False))
            except BaseException:
                self.close()
                raise
            self._unfinished -= {o.request_id for o in self._ready if o.finished}
        if not self._ready:
            self._unfinished.clear()  # another request may use these ids again
            raise StopIteration
        return self._ready.popleft()

    def close(self) -> None:
        """Abort the unfinished requests, and yield nothing more."""
        unfinished, self._unfinished = self._unfinished, set()
        self._ready.clear()
        self._engine.abort_request(sorted(unfinished))

    def __del__(self) -> None:
        if self._unfinished:  # in any thread, and at any time: it must not wait for a step
            engine, request_ids = self._engine, sorted(self._unfinished)
            engine.loop.drop(lambda: engine.abort_request(request_ids))


class LLM:
    """An engine, and the calls that most programs need.

    Several threads may use one LLM: each call has its own answers, and the engine's steps serve the requests of all.

    model: a bundled name, a local folder or a hub id. milestone: the preset, "m1" to "m4"; None is the newest.
    Every other keyword is a field of ModelConfig, CacheConfig, SchedulerConfig or EngineConfig. Raises ValueError for
    an unknown keyword, and for any value that cannot work.
    """

    def __init__(self, model: str | Path = "folo-tiny", milestone: str | None = None, **kwargs: Any) -> None:
        self.engine = LLMEngine(engine_config=EngineConfig.from_kwargs(model=model, milestone=milestone, **kwargs))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | int = 0,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts, [] for none.

        prompts: one or a list of: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. sampling_params: one
        for all or one per prompt; None takes `get_default_sampling_params()`. Raises ValueError if any prompt is
        invalid; then no prompt is started. An interrupt aborts all of them.
        """
        request_ids = self.enqueue(prompts, sampling_params, priority)
        generated = 0
        with tqdm(total=len(request_ids), desc="Generating", unit="req", disable=not use_tqdm) as bar:

            def on_done(output: RequestOutput) -> None:
                nonlocal generated
                generated += sum(len(c.token_ids) for c in output.outputs)
                bar.set_postfix_str(f"{generated} tokens")
                bar.update()

            done = self.engine.run_to_completion(request_ids, on_done)
        return list(done.values())

    @errors_as(InvalidRequestError)
    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of every prompt, best first.

        Results are those of Hugging Face's `generate` with `num_beams` and `early_stopping=False`. Raises ValueError if
        any prompt is invalid; then no prompt is started. An interrupt aborts all of them.
        """
        if not isinstance(params, BeamSearchParams):
            raise invalid("params", params, "a BeamSearchParams")
        prompt_list = as_prompt_list(prompts)
        with tqdm(total=len(prompt_list), desc="Beam search", unit="prompt", disable=not use_tqdm) as bar:

            def on_done(index: int) -> None:
                bar.update()

            return beam_search(self.engine, prompt_list, params, on_done)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ValueError if it has none."""
        if self.engine.tokenizer is None:
            raise ConfigError(f"model={self.engine.config.model.model!r} has no tokenizer; allowed: token ids")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that have none, as `generation_config` says (vLLM's name)."""
        return self.engine.defaults.params

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache. Running requests keep their blocks."""
        self.engine.loop.turn(self.engine.core.scheduler.kv.reset_prefix_cache)

    def save_trace(self, path: str | Path) -> Path:
        """Write the trace for `folovllm replay` and for Perfetto. Returns the path.

        It has the state of the blocks only with `LLM(..., trace_blocks=True)`.
        """
        return self.engine.loop.turn(lambda: record(self.engine)).save(path)

    def enqueue(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, priority: Sequence[int] | int = 0
    ) -> list[str]:
        """Check all prompts, then queue them; returns request ids. Raises ValueError with nothing queued."""
        return self.engine.enqueue(prompts, sampling_params, priority)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, priority: Sequence[int] | int = 0
    ) -> OutputStream:
        """Like `generate`, but yields a request's growing output after each step with new tokens for it.

        The call itself checks and queues the prompts. Closing or dropping the stream aborts unfinished requests.
        """
        return self.follow(self.enqueue(prompts, sampling_params, priority))

    def follow(self, request_ids: Sequence[str]) -> OutputStream:
        """Step the engine until these queued requests are complete, and yield their growing outputs."""
        return OutputStream(self.engine, request_ids)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, lists of {"role": ..., "content": ...}, with the chat template.

        The options have vLLM's meanings, see `ChatOptions`. Raises ValueError as `chat_prompts` does.
        """
        prompts = self.chat_prompts(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm)

    @errors_as(InvalidRequestError)
    def chat_prompts(self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any) -> list[Prompt]:
        """Conversations as token ids. options: those of `chat`.

        Special tokens are those that the template writes; none is added. Raises ValueError for a malformed message, for
        one that the template refuses, and for a model without a chat template.
        """
        chosen = ChatOptions(**options | {"chat_template_kwargs": options.get("chat_template_kwargs") or {}})
        tokenizer = self.engine.tokenizer
        if tokenizer is None or not (tokenizer.chat_template or chosen.chat_template):
            raise ValueError(f"model={self.engine.config.model.model!r} has no chat template; allowed: generate()")
        texts = [render(tokenizer, conversation, chosen) for conversation in conversations_of(messages)]
        ids = self.engine.loop.turn(
            lambda: [encode(tokenizer, "messages", text, add_special_tokens=False) for text in texts]
        )
        return [{"prompt_token_ids": prompt} for prompt in ids]
