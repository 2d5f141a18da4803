"""What a user gets back (vLLM's names: `vllm/outputs.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """A token's log probability."""

    logprob: float
    rank: int  #: in the vocabulary; 1 is the likeliest
    decoded_token: str | None = None


@dataclass
class RequestMetrics:
    """Times of one request, in seconds on the engine's clock (`time.perf_counter`: only differences mean something).

    token_times holds the moment each output token was known; with n > 1 it is the first sequence's.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)

    @property
    def first_token_time(self) -> float | None:
        """When the first output token was known."""
        return self.token_times[0] if self.token_times else None

    @property
    def queue_time(self) -> float | None:
        """Arrival to the first step that computed anything for the request."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to the first output token."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the gaps between consecutive output tokens, one fewer than there are tokens."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: the mean of the ITLs. None with fewer than two tokens."""
        n = len(self.token_times)
        return (self.token_times[-1] - self.token_times[0]) / (n - 1) if n > 1 else None

    @property
    def e2e_latency(self) -> float | None:
        """Arrival to finish."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass
class CompletionOutput:
    """One generated sequence.

    token_ids include the EOS or stop token that ended it; text does not, unless `include_stop_str_in_output`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  #: per token, the chosen id and the top ones
    finish_reason: str | None = None  #: "stop", "length", "abort", "error", or None while it grows
    #: The stop string or stop token id that ended it, or what the error was; None for EOS and all else
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether this sequence is complete."""
        return self.finish_reason is not None


@dataclass
class BeamSequence:
    """One result of a beam search: prompt and output in `tokens`, the EOS that ended it included."""

    tokens: list[int]
    text: str
    cum_logprob: float  #: the sum over the output's tokens
    score: float  #: what beams are ranked by, the sum over length ** penalty
    finish_reason: str  #: "stop" for an EOS, "length" else


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first (vLLM: `vllm/beam_search.py`)."""

    sequences: list[BeamSequence]
    kv_saved: float  #: the largest share of K/V, over the rounds, that beams shared instead of each holding a copy


@dataclass
class RequestOutput:
    """A request as the user sees it, whole or still growing."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
