"""A request: one sequence of tokens, its prompt and then its output. Parallel samples are several requests.

Invariants (between two steps):
  1. 0 <= num_computed_tokens <= num_tokens. K/V exists for exactly the first `num_computed_tokens` tokens.
  2. A running request that has caught up has num_computed_tokens == num_tokens - 1: the token just sampled is known,
     its K/V is what the next step computes. So the first output token runs at position num_prompt_tokens.
  3. num_output_tokens never exceeds max_output_tokens, and num_tokens never exceeds max_model_len.
  4. A finished status is final, and a finished request is never scheduled again.

Read beside vLLM's `vllm/v1/request.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from folovllm.outputs import Logprob, PromptLogprobs
from folovllm.sampling_params import SamplingParams


class RequestStatus(enum.IntEnum):
    """The state of a request. Everything after RUNNING is final (vLLM's names)."""

    WAITING = 0
    PREEMPTED = 1  # waits again: its K/V was freed or swapped out, its tokens were kept
    RUNNING = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH_CAPPED = 4
    FINISHED_ABORTED = 5
    FINISHED_ERROR = 6  # its logits left nothing to choose from

    @property
    def is_finished(self) -> bool:
        """Whether no step will ever schedule this request again."""
        return self > RequestStatus.RUNNING

    @property
    def finish_reason(self) -> str | None:
        """What the user sees: "stop", "length", "abort" or "error"; None while the request is unfinished."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}

_NEXT = {
    RequestStatus.WAITING: {RequestStatus.RUNNING},
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING},
    RequestStatus.RUNNING: {RequestStatus.PREEMPTED},
}


@dataclass(eq=False)  # compared by identity
class Request:
    """One sequence and how far it has come."""

    request_id: str
    prompt_token_ids: list[int]  # the prompt, at least one token
    sampling_params: SamplingParams
    eos_token_ids: tuple[int, ...]  # ids that end the output unless `ignore_eos`
    max_model_len: int  # the most tokens (prompt and output) the model can hold
    arrival_time: float = 0.0  # seconds on the engine's clock
    priority: int = 0
    # The request to fork, where K/V can be shared. Its tokens begin with this one's prompt without the last token.
    parent_id: str | None = None
    hold: bool = False  # keep the K/V when finished, for forks, until `free_held` or until blocks run out
    cache_salt: str = ""  # only requests with the same one share cached prefixes
    own_seed: int = 0  # of its random numbers if the sampling parameters have none
    # Of the prompt's first tokens, if they are asked for. One list for all samples of a prompt: the first of them that
    # computes a token's adds it.
    prompt_logprobs: PromptLogprobs | None = None

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in a cache and not computed
    stop_reason: int | str | None = None
    first_scheduled_time: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id!r}: the prompt has 0 tokens; allowed: at least 1")
        if self.num_prompt_tokens >= self.max_model_len:
            raise ValueError(
                f"request {self.request_id!r}: the prompt has {self.num_prompt_tokens} tokens, which leaves none "
                f"for output; allowed: at most {self.max_model_len - 1} (max_model_len is {self.max_model_len})"
            )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_to_compute(self) -> int:
        """Known tokens that have no K/V yet: the whole prompt at first, 1 in every decode step."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def max_output_tokens(self) -> int:
        """The most output tokens: `max_tokens`, limited by the model's length."""
        limit = self.max_model_len - self.num_prompt_tokens
        max_tokens = self.sampling_params.max_tokens
        return limit if max_tokens is None else min(max_tokens, limit)

    @property
    def max_total_tokens(self) -> int:
        """The longest this request can become. K/V is stored for one token fewer: the last is never computed."""
        return self.num_prompt_tokens + self.max_output_tokens

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that may not be sampled before `min_tokens`: EOS (as in vLLM even if ignored) and the user's own."""
        return frozenset(self.eos_token_ids) | frozenset(self.sampling_params.stop_token_ids or ())

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt are still to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    def prompt_rows(self, start: int, end: int) -> range:
        """Of positions [start, end), those whose logits give a log probability that is lacking: the next token's."""
        if self.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs) - 1), min(end, self.num_prompt_tokens - 1))

    def add_prompt_logprobs(self, rows: range, entries: Sequence[Mapping[int, Logprob]]) -> None:
        """Add what `prompt_rows` asked for, unless another sample has done so in the same step."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += entries[len(self.prompt_logprobs) - 1 - rows.start :]

    @property
    def is_finished(self) -> bool:
        """Whether the status is final."""
        return self.status.is_finished

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions [start, end) of prompt and output together."""
        n = self.num_prompt_tokens
        return self.prompt_token_ids[start:end] + self.output_token_ids[max(0, start - n) : max(0, end - n)]

    def set_status(self, status: RequestStatus) -> None:
        """Change the status. An unfinished request may always finish; a finished status is final."""
        if self.is_finished or not (status.is_finished or status in _NEXT[self.status]):
            raise RuntimeError(f"request {self.request_id!r} cannot go from {self.status.name} to {status.name}")
        self.status = status
