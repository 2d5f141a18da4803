"""Filters of random sampling, in the order in which the sampler applies them, and penalties.

Each function takes float32 logits `[R, V]` and one parameter per row `[R, 1]`, and returns new logits `[R, V]`. A
dropped token gets the logit -inf, which is probability 0. Compare vLLM's `v1/sample/logits_processor/builtin.py`
(min-p), `v1/sample/ops/topk_topp_sampler.py` (top-k and top-p) and `model_executor/layers/utils.py: apply_penalties`.
"""

from __future__ import annotations

import torch

NEG_INF = -float("inf")


def apply_temperature(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Divide by `temperature` `[R, 1]`, > 0: below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def apply_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Drop tokens less likely than `min_p` `[R, 1]`, in [0, 1], times the likeliest (arXiv 2407.01082)."""
    probs = logits.softmax(dim=-1)  # [R, V]
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), NEG_INF)


def apply_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Keep the `top_k` `[R, 1]` (int64, >= 1) largest logits (arXiv 1805.04833).

    All tokens that tie with the k-th stay: their order would depend on the sorting algorithm.
    """
    top_k = top_k.clamp(max=logits.shape[-1])
    largest = logits.topk(int(top_k.max()), dim=-1).values  # [R, K], descending
    return logits.masked_fill(logits < largest.gather(1, top_k - 1), NEG_INF)


def apply_top_p(logits: torch.Tensor, top_p: torch.Tensor, num_candidates: int = 1024) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `top_p` `[R, 1]` (arXiv 1904.09751).

    From the least likely token upwards, drop while the dropped mass is at most 1 - top_p. The likeliest token always
    stays. Among ties at the edge, lower ids are dropped first.

    On a CPU, where sorting a vocabulary takes far longer than all other steps together, rows are first cut among their
    `num_candidates` likeliest tokens, and sorted as a whole only if the edge is not there.
    """
    if logits.device.type != "cpu" or logits.shape[-1] <= num_candidates:
        return _cut(logits, top_p, *logits.sort(dim=-1, stable=True))
    probs = logits.softmax(dim=-1)  # [R, V]
    token_ids = logits.topk(num_candidates, dim=-1).indices.sort(dim=-1).values  # [R, K], so that ties are by id
    ascending, order = logits.gather(1, token_ids).sort(dim=-1, stable=True)
    token_ids = token_ids.gather(1, order)
    mass = probs.gather(1, token_ids)  # [R, K]
    below = (probs.sum(dim=-1, keepdim=True) - mass.sum(dim=-1, keepdim=True)).clamp(min=0)  # [R, 1]
    drop = below + mass.cumsum(dim=-1) <= 1 - top_p
    drop[:, -1] = False
    # The tokens that are no candidates have to go, and none of them may tie with one that stays.
    edge = ascending.masked_fill(drop, float("inf")).amin(dim=-1, keepdim=True)  # [R, 1], the least logit kept
    found = (ascending[:, :1] < edge).squeeze(1)  # [R]
    kept = torch.full_like(logits, NEG_INF).scatter(1, token_ids, ascending.masked_fill(drop, NEG_INF))
    rows = (~found).nonzero().squeeze(1)
    if len(rows):
        kept[rows] = _cut(logits[rows], top_p[rows], *logits[rows].sort(dim=-1, stable=True))
    return kept


def _cut(logits: torch.Tensor, top_p: torch.Tensor, ascending: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`logits` `[R, V]` without the tokens whose mass, from below, is at most 1 - top_p; the other two are its sort."""
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[:, -1] = False
    return logits.masked_fill(drop.scatter(1, token_ids, drop), NEG_INF)


def apply_penalties(
    logits: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Penalise tokens that have occurred. `logits` `[R, L]` are those of these tokens alone; penalties are `[R, 1]`.

    output_counts: how often each of them occurs in the output, `[R, L]`; 0 for one that is in the prompt only.
    Repetition (arXiv 1909.05858): tokens in prompt or output; positive logits are divided, others multiplied.
    Frequency and presence (OpenAI API): tokens in the output only; subtracted per occurrence, and once.
    """
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    return logits - frequency * output_counts - presence * (output_counts > 0)
