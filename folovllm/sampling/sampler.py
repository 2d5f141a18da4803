"""The sampler: one row of logits per request in, one token id per request out.

The order is vLLM V1's (`vllm/v1/sample/sampler.py`). Each step works on the result of the one before:

  1. log probabilities to report are those of the raw logits;
  2. edits that can change the argmax: the min_tokens ban and logit_bias, then the penalties;
  3. greedy rows take the argmax and are done;
  4. the others: temperature, min_p, top_k, top_p, softmax, and one draw.

A step that no row needs is skipped, and a filter changes only the rows that use it, so a row's token never depends on
the sampling parameters of the others. A draw depends on the request's seed and the token's index, and on nothing else:
the sampler has no state, and sampling again gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from folovllm.outputs import Logprob
from folovllm.sampling.batch import Asked, Edits, Penalties, SamplingMetadata
from folovllm.sampling.logits import (
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k,
    apply_top_p,
)
from folovllm.sampling.logprobs import gather_logprobs
from folovllm.sampling.noise import exponential_noise, exponential_noise_at

NO_TOKEN = -1  # the token id of a row from which no token can be chosen


@dataclass
class SamplerOutput:
    """One entry per row."""

    token_ids: list[int]
    # The chosen token first, then the likeliest by rank. None for rows without params.logprobs
    logprobs: list[Mapping[int, Logprob] | None]
    # Rows without a distribution: they hold NaN or +inf, or every token is banned. Their token id is `NO_TOKEN`
    bad_rows: list[int]
    sampled: torch.Tensor = field(compare=False)  # `token_ids` on the logits' device, [R]


class Sampler:
    """Chooses tokens."""

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, rows: SamplingMetadata, num_output: Sequence[int]) -> SamplerOutput:
        """Choose one token per row of `logits` `[R, V]`, of any float type. The logits are not changed.

        num_output: `[R]`, how many tokens each request has sampled before. A bad row fails alone
        (`SamplerOutput.bad_rows`). Raises ValueError for logits of another shape or type.
        """
        if logits.dim() != 2 or len(logits) != rows.num_rows or not logits.is_floating_point():
            given = f"{logits.dtype} {list(logits.shape)}"
            raise ValueError(f"logits={given} is not valid; allowed: floats [{rows.num_rows}, vocabulary]")
        if logits.dtype == torch.float64:
            logits = logits.float()  # 16-bit types are converted later: that keeps order and ties
        needs_index = rows.seeds is not None or rows.edits is not None
        index = torch.tensor(num_output, device=logits.device) if needs_index else None  # [R]
        edited = logits
        if index is not None and rows.edits is not None and min(num_output) < rows.edits.last:
            edited = _edit(edited.to(torch.float32, copy=True), rows.edits, index)
        if rows.penalties is not None:
            edited = penalize(edited.to(torch.float32, copy=edited is logits), rows.penalties)
        sampled = _choose(edited, rows, index)
        token_ids: list[int] = sampled.tolist()  # the step's one transfer, unless log probabilities are asked for
        bad_rows = [row for row, token_id in enumerate(token_ids) if token_id == NO_TOKEN]
        logprobs: list[Mapping[int, Logprob] | None] = [None] * len(token_ids)
        asked = {row: k for row, k in rows.num_logprobs.items() if row not in bad_rows}
        for row, entry in gather_logprobs(logits, asked, token_ids).items():
            logprobs[row] = entry
        return SamplerOutput(token_ids, logprobs, bad_rows, sampled)


def _choose(logits: torch.Tensor, rows: SamplingMetadata, index: torch.Tensor | None) -> torch.Tensor:
    """Token ids `[R]`, or NO_TOKEN."""
    if rows.seeds is None or index is None:
        return _argmax(logits)
    if rows.random_rows is None:
        return _draw(logits, rows, rows.seeds, index)
    token_ids = _argmax(logits)
    drawn = _draw(logits[rows.random_rows], rows, rows.seeds, index[rows.random_rows])
    return token_ids.index_copy(0, rows.random_rows, drawn)


def _draw(logits: torch.Tensor, rows: SamplingMetadata, seeds: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Step 4. Token ids `[R]`, or NO_TOKEN."""
    logits = logits.float()
    logits = _where_asked(apply_temperature, logits, rows.temperature)
    logits = _where_asked(apply_min_p, logits, rows.min_p)
    logits = _where_asked(apply_top_k, logits, rows.top_k)
    logits = _where_asked(apply_top_p, logits, rows.top_p)
    return _race(logits, seeds, index, rows.min_p is not None or rows.top_k is not None or rows.top_p is not None)


def _race(logits: torch.Tensor, seeds: torch.Tensor, index: torch.Tensor, is_filtered: bool) -> torch.Tensor:
    """One draw per row from the softmax of `logits` `[R, V]`: token ids `[R]`, or NO_TOKEN.

    A race of exponentials: noise_i / p_i is an exponential time with rate p_i, and i is first with probability p_i. So
    the index of the largest p_i / noise_i is a sample, for all rows at once and without a sync.

    On a CPU, where noise takes longer than all else, few tokens that filters leave make it for these alone.
    """
    probs = logits.softmax(dim=-1)  # [R, V]
    may_be_few = is_filtered and logits.device.type == "cpu"
    if not may_be_few or 4 * int(probs.count_nonzero()) > probs.numel():
        return _argmax(probs.div_(exponential_noise(seeds, index, logits.shape[-1])))
    rows, token_ids = probs.nonzero().unbind(dim=1)  # [N]
    probs[rows, token_ids] = probs[rows, token_ids].div_(exponential_noise_at(seeds[rows], index[rows], token_ids))
    return _argmax(probs)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """The index of the first largest score per row, `[R]`, or NO_TOKEN if that score is not finite."""
    best = scores.max(dim=-1)  # [R] values and indices; four times as fast as argmax in bfloat16 on a CPU
    # max returns NaN if there is one in the row.
    return best.indices.masked_fill(~best.values.isfinite(), NO_TOKEN)


def _where_asked(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, asked: Asked | None
) -> torch.Tensor:
    """`apply(logits, values)` on the rows that ask for it."""
    if asked is None:
        return logits
    if asked.rows is None:
        return apply(logits, asked.values)
    return logits.index_copy(0, asked.rows, apply(logits[asked.rows], asked.values))


def _edit(logits: torch.Tensor, edits: Edits, index: torch.Tensor) -> torch.Tensor:
    """Add bans and biases to the logits that they name, in place. No bias lifts a ban: -inf stays what it is."""
    bias = edits.bias.where(index[edits.rows] < edits.until, 0.0)  # [E]
    return logits.index_put_((edits.rows, edits.token_ids), bias, accumulate=True)


def penalize(logits: torch.Tensor, asked: Penalties) -> torch.Tensor:
    """Apply the penalties to the tokens that have occurred in the rows that ask, in place."""
    token_ids, counts, used = asked.counts.read(asked.slots)  # [P, L]
    cells = (asked.rows[:, None], token_ids)
    values = logits[cells]
    penalized = apply_penalties(values, counts, asked.repetition, asked.frequency, asked.presence)
    # A row that is shorter than the longest writes its first token's logit again and again, the same each time.
    return logits.index_put_(cells, penalized.where(used > 0, values))
