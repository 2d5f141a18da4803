"""LLM: prompts in, completions out, in one call (vLLM: `vllm/entrypoints/llm.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from tqdm import tqdm

from folovllm.checks import invalid
from folovllm.config import EngineConfig
from folovllm.engine.beam_search import beam_search
from folovllm.engine.input_processor import Prompt, as_prompt_list, encode
from folovllm.engine.llm_engine import LLMEngine, Params
from folovllm.engine.recording import record
from folovllm.outputs import BeamSearchOutput, RequestOutput
from folovllm.sampling_params import BeamSearchParams, SamplingParams

Message = dict[str, str]


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
        if self._unfinished:
            self.close()


class LLM:
    """An engine, and the calls that most programs need.

    model: a bundled name, a local folder or a hub id. milestone: the preset, "m1" to "m4"; None is the newest.
    Every other keyword is a field of ModelConfig, CacheConfig, SchedulerConfig or EngineConfig. Raises ValueError for
    an unknown keyword, and for any value that cannot work.
    """

    def __init__(self, model: str = "folo-tiny", milestone: str | None = None, **kwargs: Any) -> None:
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

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that have none, as `generation_config` says (vLLM's name)."""
        return self.engine.defaults.params

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache. Running requests keep their blocks."""
        self.engine.core.scheduler.kv.reset_prefix_cache()

    def save_trace(self, path: str | Path) -> Path:
        """Write the trace for `folovllm replay` and for Perfetto. Returns the path.

        It has the state of the blocks only with `LLM(..., trace_blocks=True)`.
        """
        return record(self.engine).save(path)

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
    ) -> list[RequestOutput]:
        """Answer one conversation or several, lists of {"role": ..., "content": ...}, with the chat template."""
        return self.generate(self.chat_prompts(messages), sampling_params, use_tqdm)

    def chat_prompts(self, messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Prompt]:
        """Conversations as token ids, with the beginning of the assistant's turn.

        Raises ValueError for a malformed message, and for a model without a chat template.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError(f"model={self.engine.config.model.model!r} has no chat template; allowed: generate()")
        single = isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], dict)
        if not isinstance(messages, (list, tuple)):
            raise invalid("messages", messages, "a list of messages, or a list of such lists")
        conversations = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        prompts: list[Prompt] = []
        for conversation in conversations:
            check_conversation(conversation)
            try:
                rendered = str(
                    tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
                )
            except TemplateError as error:  # such as a model without a system role
                raise ValueError(f"messages={conversation!r} is refused by the chat template: {error}") from error
            ids = encode(tokenizer, "messages", rendered, add_special_tokens=False)
            prompts.append({"prompt_token_ids": ids})
        return prompts


def check_conversation(conversation: Any) -> None:
    """Raise ValueError unless `conversation` is a non-empty list of {"role": str, "content": str}."""
    allowed = 'a non-empty list of {"role": "system" | "user" | "assistant", "content": text}'
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise invalid("messages", conversation, allowed)
    for i, message in enumerate(conversation):
        known = isinstance(message, dict) and message.keys() == {"role", "content"}
        roles = ("system", "user", "assistant")
        if not known or message["role"] not in roles or not isinstance(message["content"], str):
            raise invalid(f"messages[{i}]", message, allowed)
