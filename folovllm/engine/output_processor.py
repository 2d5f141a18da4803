"""The core's token ids to the user's outputs (vLLM: `vllm/v1/engine/output_processor.py`).

One `ParentRequest` per `add_request`. It has one `RequestState` per generated sequence; each of these is one request of
the core.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from folovllm.engine.detokenizer import Detokenizer, IncrementalDecoder
from folovllm.messages import EngineCoreOutput
from folovllm.outputs import CompletionOutput, Logprob, PromptLogprobs, RequestMetrics, RequestOutput
from folovllm.sampling.logprobs import WholeVocabulary, logprob_of
from folovllm.sampling_params import SamplingParams


@dataclass
class RequestState:
    """One sequence: its sampled tokens, and their text."""

    request_id: str  # the core's
    index: int
    params: SamplingParams
    prompt_token_ids: list[int]
    tokenizer: PreTrainedTokenizerBase | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    detokenizer: Detokenizer | None = None
    token_decoder: IncrementalDecoder | None = None  # for the texts in logprobs, which show special tokens

    def __post_init__(self) -> None:
        if self.params.logprobs is not None:
            self.logprobs, self.cumulative_logprob = [], 0.0
            if self.tokenizer is not None:
                self.token_decoder = IncrementalDecoder(
                    self.tokenizer, self.prompt_token_ids, skip_special_tokens=False
                )
        if self.tokenizer is not None:
            self.detokenizer = Detokenizer(
                self.tokenizer,
                self.params.stop or (),
                self.params.min_tokens,
                self.params.include_stop_str_in_output,
                self.prompt_token_ids,
                self.params.skip_special_tokens,
                self.params.spaces_between_special_tokens,
            )

    def add(self, output: EngineCoreOutput) -> bool:
        """Add new tokens. True if their text completed a stop string, which the core has to be told."""
        self.token_ids.extend(output.new_token_ids)
        self._add_logprobs(output)
        ended_by_token = output.finish_reason == "stop"
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if self.detokenizer is None:
            return False
        hide_last = ended_by_token and not self.params.include_stop_str_in_output
        self.detokenizer.update(output.new_token_ids[:-1] if hide_last else output.new_token_ids)
        if self.finish_reason is not None:
            self.detokenizer.finish()
        if self.detokenizer.stop_reason is None or ended_by_token:
            return False
        unknown_to_core = self.finish_reason is None
        self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop_reason
        return unknown_to_core

    def fail(self, reason: str) -> bool:
        """End the sequence, whose tokens have no text. True if the core has to be told."""
        unknown_to_core = self.finish_reason is None
        self.finish_reason, self.stop_reason = "error", reason
        return unknown_to_core

    def abort(self) -> None:
        """End the sequence early."""
        if self.finish_reason is None:
            self.finish_reason = "abort"
            if self.detokenizer is not None:
                self.detokenizer.finish()

    def completion(self) -> CompletionOutput:
        """A copy of the current state."""
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.visible if self.detokenizer is not None else "",
            token_ids=list(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _add_logprobs(self, output: EngineCoreOutput) -> None:
        if self.logprobs is None or self.cumulative_logprob is None or output.new_logprobs is None:
            return
        for token_id, entries in zip(output.new_token_ids, output.new_logprobs, strict=True):
            self.cumulative_logprob += logprob_of(entries, token_id)
            if self.token_decoder is not None:
                add_texts(entries, token_id, self.token_decoder)
            self.logprobs.append(entries)


def add_texts(entries: Mapping[int, Logprob], token_id: int, decoder: IncrementalDecoder) -> None:
    """Set `decoded_token` of the entries of one place. The decoder goes on with the chosen token."""
    if isinstance(entries, WholeVocabulary):  # its entries are made when the user reads them
        entries.decode = copy.copy(decoder).peek
    else:
        for i, entry in entries.items():
            entry.decoded_token = decoder.peek(i)
    decoder.push(token_id)


@dataclass
class ParentRequest:
    """One call of `add_request`: its prompt, its sequences and its times."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[RequestState]
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    caller: int = 0  # the thread that submitted it

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)

    def add_prompt_logprobs(self, output: EngineCoreOutput, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take the prompt's log probabilities from the first sequence that has them."""
        if self.prompt_logprobs is not None or output.prompt_logprobs is None:
            return
        if tokenizer is not None:
            decoder = IncrementalDecoder(tokenizer, self.prompt_token_ids[:1], skip_special_tokens=False)
            for token_id, entries in zip(self.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
                add_texts(entries or {}, token_id, decoder)
        self.prompt_logprobs = output.prompt_logprobs

    def output(self) -> RequestOutput:
        """A copy of the current state, for the user."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            outputs=[s.completion() for s in self.sequences],
            finished=self.finished,
            metrics=replace(self.metrics, token_times=list(self.metrics.token_times)),
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
        )
