"""The sampler: one row of logits per request in, one token id per request out.

The order is vLLM V1's (`vllm/v1/sample/sampler.py`). Each step works on the result of the one before:

  1. log probabilities to report are those of the raw logits;
  2. edits that can change the argmax: the min_tokens ban, then logit_bias, then the penalties;
  3. greedy rows take the argmax and are done;
  4. the others: temperature, min_p, top_k, top_p, softmax, and one draw.

A step that no row needs is skipped, and a filter changes only the rows that use it, so a row's token never depends on
the sampling parameters of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from folovllm.outputs import Logprob
from folovllm.sampling.logits import (
    NEG_INF,
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    count_tokens,
)
from folovllm.sampling_params import SamplingParams

NO_TOKEN = -1  # the token id of a row from which no token can be chosen


@dataclass
class SamplingState:
    """One request as the sampler sees it. The runner keeps one per live request."""

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # may be the request's own growing list: read at each call, never changed
    stop_token_ids: frozenset[int]  # EOS and params.stop_token_ids, banned for the first params.min_tokens tokens
    generator: torch.Generator | None = None  # of a seeded request; None: the sampler's, shared by unseeded requests


@dataclass
class SamplerOutput:
    """One entry per row."""

    token_ids: list[int]
    # The chosen token first, then the likeliest by rank. None for rows without params.logprobs
    logprobs: list[dict[int, Logprob] | None]
    # Rows without a distribution: they hold NaN or +inf, or every token is banned. Their token id is `NO_TOKEN`
    bad_rows: list[int] = field(default_factory=list)


class Sampler:
    """Chooses tokens. Owns the random stream that all unseeded requests share.

    seed: of that stream. device: of the logits; a generator draws on one device only.
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def make_generator(self, params: SamplingParams) -> torch.Generator | None:
        """The random stream of a request; None if it has no seed or is greedy. Call it once per request."""
        if params.seed is None or params.is_greedy:
            return None
        return torch.Generator(self.device).manual_seed(params.seed)

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> SamplerOutput:
        """Choose one token per state from `logits` `[R, V]`, of any float type. The logits are not changed.

        A bad row fails alone (`SamplerOutput.bad_rows`). Raises ValueError for logits of another shape, type or device.
        """
        if logits.dim() != 2 or len(logits) != len(states) or not logits.is_floating_point():
            given = f"{logits.dtype} {list(logits.shape)}"
            raise ValueError(f"logits={given} is not valid; allowed: floats [{len(states)}, vocabulary]")
        if logits.device.type != self.device.type:
            raise ValueError(f"logits are on {logits.device}; allowed: the sampler's device, {self.device}")
        if logits.dtype == torch.float64:
            logits = logits.float()  # 16-bit types are converted later: that keeps order and ties
        token_ids: list[int] = self._choose(_edit(logits, states), states).tolist()
        bad_rows = [row for row, token_id in enumerate(token_ids) if token_id == NO_TOKEN]
        return SamplerOutput(token_ids, _gather_logprobs(logits, states, token_ids), bad_rows)

    def _choose(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
        """Token ids `[R]`, or NO_TOKEN."""
        random_rows = [row for row, state in enumerate(states) if not state.params.is_greedy]
        if not random_rows:
            return _argmax(logits)
        if len(random_rows) == len(states):
            return self._draw(logits, states)
        token_ids = _argmax(logits)
        index = torch.tensor(random_rows, device=logits.device)
        token_ids[index] = self._draw(logits[index], [states[row] for row in random_rows])
        return token_ids

    def _draw(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
        """Step 4. Token ids `[R]`, or NO_TOKEN."""
        vocab_size = logits.shape[-1]
        params = [state.params for state in states]
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        logits = logits.float()
        logits = _where_asked(apply_temperature, logits, [p.temperature for p in params], off=1.0)
        logits = _where_asked(apply_min_p, logits, [p.min_p for p in params], off=0.0)
        logits = _where_asked(apply_top_k, logits, top_k, off=vocab_size)
        logits = _where_asked(apply_top_p, logits, [p.top_p for p in params], off=1.0)

        # A race of exponentials: noise_i / p_i is an exponential time with rate p_i, and i is first with probability
        # p_i. So the index of the largest p_i / noise_i is a sample, for all rows at once and without a sync.
        noise = torch.empty_like(logits)  # [R, V]
        if any(state.generator is None for state in states):
            noise.exponential_(generator=self.generator)
        for row, state in enumerate(states):
            if state.generator is not None:
                noise[row].exponential_(generator=state.generator)
        # Some backends draw an exact 0 very rarely (pytorch issues 22557, 192577). For a dropped token that would be
        # 0 / 0 = NaN, which argmax takes for the largest.
        noise.clamp_(min=torch.finfo(noise.dtype).tiny)
        return _argmax(logits.softmax(dim=-1) / noise)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """The index of the first largest score per row, `[R]`, or NO_TOKEN if that score is not finite."""
    best = scores.max(dim=-1)  # [R] values and indices; four times as fast as argmax in bfloat16 on a CPU
    # max returns NaN if there is one in the row.
    return best.indices.masked_fill(~best.values.isfinite(), NO_TOKEN)


def _where_asked(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    values: Sequence[float],
    off: float,
) -> torch.Tensor:
    """`apply(logits, values)` on the rows whose value is not `off`."""
    rows = [row for row, value in enumerate(values) if value != off]
    if not rows:
        return logits
    dtype = torch.int64 if isinstance(off, int) else torch.float32
    column = torch.tensor([values[row] for row in rows], dtype=dtype, device=logits.device)[:, None]
    if len(rows) == len(values):
        return apply(logits, column)
    index = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, index, apply(logits[index], column))


def _edit(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Step 2 on a float32 copy `[R, V]`; the given logits themselves if no row needs it."""
    bans = [
        (row, token_id)
        for row, state in enumerate(states)
        if len(state.output_token_ids) < state.params.min_tokens
        for token_id in state.stop_token_ids
    ]
    biases = {
        (row, token_id): bias
        for row, state in enumerate(states)
        for token_id, bias in (state.params.logit_bias or {}).items()
    }
    if not (bans or biases or any(state.params.has_penalties for state in states)):
        return logits
    device = logits.device
    logits = logits.to(torch.float32, copy=True)
    if bans:
        rows, token_ids = torch.tensor(bans, device=device).T
        logits[rows, token_ids] = NEG_INF
    if biases:
        rows, token_ids = torch.tensor(list(biases), device=device).T
        logits[rows, token_ids] += torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
    return penalize(logits, states)


def penalize(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Apply the penalties to the rows that have any."""
    rows = [row for row, state in enumerate(states) if state.params.has_penalties]
    if not rows:
        return logits
    device, vocab_size = logits.device, logits.shape[-1]
    asking = [states[row] for row in rows]
    prompt_counts = count_tokens([state.prompt_token_ids for state in asking], vocab_size, device)  # [P, V]
    output_counts = count_tokens([state.output_token_ids for state in asking], vocab_size, device)  # [P, V]
    penalties = torch.tensor(
        [(s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty) for s in asking],
        dtype=torch.float32,
        device=device,
    )  # [P, 3]
    index = torch.tensor(rows, device=device)
    penalized = apply_penalties(logits[index], prompt_counts, output_counts, *penalties.split(1, dim=1))
    return logits.index_copy(0, index, penalized)


def _gather_logprobs(
    logits: torch.Tensor, states: Sequence[SamplingState], token_ids: Sequence[int]
) -> list[dict[int, Logprob] | None]:
    """Step 1. It can come last, because the raw logits have not changed."""
    logprobs: list[dict[int, Logprob] | None] = [None] * len(states)
    vocab_size = logits.shape[-1]
    asked = {
        row: vocab_size if s.params.logprobs == -1 else min(s.params.logprobs, vocab_size)
        for row, s in enumerate(states)
        if s.params.logprobs is not None and token_ids[row] != NO_TOKEN
    }
    if not asked:
        return logprobs
    table = logits[list(asked)].log_softmax(dim=-1, dtype=torch.float32)  # [L, V]
    chosen = torch.tensor([token_ids[row] for row in asked], device=logits.device)[:, None]  # [L, 1]
    values = table.gather(1, chosen)  # [L, 1]
    # As in vLLM, a tie counts against the chosen token: as many tokens are at least as likely.
    ranks = (table >= values).sum(dim=-1).tolist()
    top_values, top_ids = (top.tolist() for top in table.topk(max(asked.values()), dim=-1))  # [L, K] each
    for i, (row, num_top) in enumerate(asked.items()):
        # A dict keeps the position of a key that is written twice, so the chosen token stays first.
        entry = {token_ids[row]: Logprob(values[i].item(), ranks[i])}
        for rank in range(1, num_top + 1):
            entry[top_ids[i][rank - 1]] = Logprob(top_values[i][rank - 1], rank)
        logprobs[row] = entry
    return logprobs
