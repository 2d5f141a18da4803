"""LLM: prompts in, completions out, in one call (vLLM: `vllm/entrypoints/llm.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from tqdm import tqdm

from folovllm.config import EngineConfig
from folovllm.engine.beam_search import beam_search
from folovllm.engine.input_processor import Prompt, as_prompt_list, broadcast_params, encode
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.recording import record
from folovllm.outputs import BeamSearchOutput, RequestOutput
from folovllm.sampling_params import BeamSearchParams, SamplingParams

Message = dict[str, str]
Params = SamplingParams | Sequence[SamplingParams] | None


class OutputStream(Iterator[RequestOutput]):
    """Growing outputs of some requests, in the order in which steps bring them.

    Not a generator, because one that is dropped before its first `next` would never clean up behind itself. Raises
    ValueError for an id that the engine does not have.
    """

    def __init__(self, engine: LLMEngine, request_ids: Sequence[str]) -> None:
        self._engine = engine
        self._unfinished: set[str] = set()
        self._turns: deque[str] = deque(request_ids)  # each is waited for in turn
        self._ready: deque[RequestOutput] = deque()
        engine.check_live(request_ids)
        self._unfinished.update(request_ids)

    def __next__(self) -> RequestOutput:
        while not self._ready and self._waits():
            try:
                self._ready.extend(self._engine.step_for(self._unfinished, final_only=False))
            except BaseException:
                self.close()
                raise
            self._unfinished -= {o.request_id for o in self._ready if o.finished}
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def _waits(self) -> bool:
        """Whether any request is still to come. One that somebody else aborted or took over is not."""
        while self._turns:
            first = self._turns[0]
            if first in self._unfinished and self._engine.is_live(first):
                return True
            self._unfinished.discard(first)
            self._turns.popleft()
        return False

    def close(self) -> None:
        """Abort what is unfinished, and yield nothing more."""
        unfinished, self._unfinished = self._unfinished, set()
        self._ready.clear()
        self._engine.abort_request(sorted(unfinished))

    def __del__(self) -> None:
        if self._unfinished:
            self.close()


class LLM:
    """An engine and the calls most programs want.

    model: a bundled name, a local folder or a hub id. milestone: which stage of the course runs it; None is the newest.
    Every other keyword is a field of ModelConfig, CacheConfig, SchedulerConfig or EngineConfig. Raises ValueError for a
    keyword that none of them has, and for any value that cannot work.
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
        for all or one per prompt. Raises ValueError if any prompt is bad, and then none of them is started. When
        interrupted, its requests leave the engine.
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
        """The `beam_width` likeliest continuations that a beam search finds of every prompt, best first.

        Results are those of Hugging Face's `generate` with `num_beams` and `early_stopping=False`. Raises ValueError if
        any prompt is bad, and then none is started. When interrupted, nothing of it stays in the engine.
        """
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"params={params!r} is not valid; allowed: a BeamSearchParams")
        prompt_list = as_prompt_list(prompts)
        with tqdm(total=len(prompt_list), desc="Beam search", unit="prompt", disable=not use_tqdm) as bar:

            def on_done(index: int) -> None:
                bar.update()

            return beam_search(self.engine, prompt_list, params, on_done)

    def reset_prefix_cache(self) -> None:
        """Let no later request find what was computed so far. Requests that run keep what they have."""
        self.engine.core.scheduler.kv.reset_prefix_cache()

    def save_trace(self, path: str | Path) -> Path:
        """Write what each step did, for `folovllm replay` and for Perfetto. Returns the path.

        The state of the blocks is in it if the engine recorded that: `LLM(..., trace_blocks=True)`.
        """
        return record(self.engine).save(path)

    def enqueue(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, priority: Sequence[int] | int = 0
    ) -> list[str]:
        """Check every prompt, then queue them all; their request ids. Raises ValueError with nothing queued."""
        prompt_list = as_prompt_list(prompts)
        params = broadcast_params(sampling_params, len(prompt_list))
        priorities = list(priority) if isinstance(priority, (list, tuple)) else [priority] * len(prompt_list)
        if len(priorities) != len(prompt_list):
            raise ValueError(
                f"priority={priority!r} is not valid; allowed: one integer or a list of {len(prompt_list)}"
            )
        submissions = [
            self.engine.prepare(self.engine.next_request_id(), prompt, p, rank)
            for prompt, p, rank in zip(prompt_list, params, cast("list[int]", priorities), strict=True)
        ]
        self.engine.submit(submissions)
        return [s.user.request_id for s in submissions]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, priority: Sequence[int] | int = 0
    ) -> OutputStream:
        """Like `generate`, but yields each request's growing output after every step that moved it on.

        The prompts are checked and queued by the call itself. A stream that is closed or dropped early aborts the rest.
        """
        return self.follow(self.enqueue(prompts, sampling_params, priority))

    def follow(self, request_ids: Sequence[str]) -> OutputStream:
        """The growing outputs of requests that were queued, stepping the engine until they are complete."""
        return OutputStream(self.engine, request_ids)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: lists of {"role": ..., "content": ...}, through the chat template."""
        return self.generate(self.chat_prompts(messages), sampling_params, use_tqdm)

    def chat_prompts(self, messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Prompt]:
        """Conversations as token ids, each ending where the assistant's turn begins.

        Raises ValueError for a malformed message, and for a model without a chat template.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError(f"model={self.engine.config.model.model!r} has no chat template; allowed: generate()")
        single = isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], dict)
        if not isinstance(messages, (list, tuple)):
            raise ValueError(
                f"messages={messages!r} is not valid; allowed: a list of messages, or a list of such lists"
            )
        conversations = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        prompts: list[Prompt] = []
        for conversation in conversations:
            check_conversation(conversation)
            try:
                rendered = str(
                    tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
                )
            except TemplateError as error:  # such as: this model has no system role
                raise ValueError(f"messages={conversation!r} is refused by the chat template: {error}") from error
            ids = encode(tokenizer, "messages", rendered, add_special_tokens=False)
            prompts.append({"prompt_token_ids": ids})
        return prompts


def check_conversation(conversation: Any) -> None:
    """Raise ValueError unless `conversation` is a non-empty list of {"role": str, "content": str}."""
    allowed = 'a non-empty list of {"role": "system" | "user" | "assistant", "content": text}'
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"messages={conversation!r} is not valid; allowed: {allowed}")
    for i, message in enumerate(conversation):
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or not all(isinstance(v, str) for v in message.values())
            or message["role"] not in ("system", "user", "assistant")
        ):
            raise ValueError(f"messages[{i}]={message!r} is not valid; allowed: {allowed}")
