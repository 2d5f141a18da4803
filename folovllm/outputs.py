"""The results of a request (vLLM's names: `vllm/outputs.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """A token's log probability."""

    logprob: float
    rank: int  #: in the vocabulary; 1 is the likeliest
    #: What the token adds to the text at its place, special tokens by name. "" if it ends within a character, which
    #: is in the text of the token that completes it.
    decoded_token: str | None = None


PromptLogprobs = list[Mapping[int, Logprob] | None]  # None for the first token, then a token's entry and the likeliest


@dataclass
class RequestMetrics:
    """Times of one request, in seconds on the engine's clock (`time.perf_counter`: only differences are meaningful)."""

    arrival_time: float
    first_scheduled_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)  #: of each output token; with n > 1 the first sequence's

    @property
    def first_token_time(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def queue_time(self) -> float | None:
        """Arrival to the first step with tokens of the request."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to the first output token."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the times between consecutive output tokens."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: the mean of the ITLs. None with fewer than two tokens."""
        n = len(self.token_times)
        return (self.token_times[-1] - self.token_times[0]) / (n - 1) if n > 1 else None

    @property
    def e2e_latency(self) -> float | None:
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str  #: without the stop string or stop token, unless `include_stop_str_in_output`
    token_ids: list[int]  #: with the EOS or stop token
    cumulative_logprob: float | None = None
    logprobs: list[Mapping[int, Logprob]] | None = None  #: per token, the chosen id and the top ones, as a dict
    finish_reason: str | None = None  #: "stop", "length", "abort", "error", or None while it grows
    #: The stop string or stop token id that ended it, or the error message; None in all other cases
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class BeamSequence:
    """One result of a beam search."""

    tokens: list[int]  #: of prompt and output, with the EOS
    text: str
    cum_logprob: float  #: of the output's tokens
    score: float  #: for ranking: cum_logprob / length ** length_penalty
    finish_reason: str  #: "stop" for an EOS or a stop token, else "length"
    stop_reason: int | None = None  #: the stop token that ended it; None for an EOS


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first (vLLM: `vllm/beam_search.py`)."""

    sequences: list[BeamSequence]
    kv_saved: float  #: share of K/V saved because beams share blocks; the largest over the rounds


@dataclass
class RequestOutput:
    """The output of a request, complete or still growing."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0  #: prompt tokens found in the prefix cache
    #: With `SamplingParams.prompt_logprobs`, once the prompt is computed: None for its first token, then for each
    #: token its entry and those of the likeliest, as in `CompletionOutput.logprobs`
    prompt_logprobs: PromptLogprobs | None = None
