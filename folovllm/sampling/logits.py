"""Filters of random sampling, in the order in which the sampler applies them, and penalties.

Each function takes float32 logits `[R, V]` and one parameter per row `[R, 1]`, and returns new logits `[R, V]`. A
dropped token gets the logit -inf, which is probability 0. Compare vLLM's `v1/sample/logits_processor/builtin.py`
(min-p), `v1/sample/ops/topk_topp_sampler.py` (top-k and top-p) and `model_executor/layers/utils.py: apply_penalties`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

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


def apply_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `top_p` `[R, 1]` (arXiv 1904.09751).

    From the least likely token upwards, drop while the dropped mass is at most 1 - top_p. The likeliest token always
    stays. Among ties at the edge, lower ids are dropped first.
    """
    ascending, token_ids = logits.sort(dim=-1, stable=True)  # [R, V] each
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[:, -1] = False
    return logits.masked_fill(drop.scatter(1, token_ids, drop), NEG_INF)


def apply_penalties(
    logits: torch.Tensor,
    prompt_counts: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Penalise tokens that have occurred. Counts are `[R, V]`, from `count_tokens`; penalties are `[R, 1]`.

    Repetition (arXiv 1909.05858): tokens in prompt or output; positive logits are divided, others multiplied.
    Frequency and presence (OpenAI API): tokens in the output only; subtracted per occurrence, and once.
    """
    in_output = output_counts > 0  # [R, V]
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_output | (prompt_counts > 0), scaled, logits)
    return logits - frequency * output_counts - presence * in_output


def count_tokens(lists: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """How often each token id occurs in each of R lists: int64 `[R, V]`.

    Ids without a logit are not counted: some models embed tokens that they cannot generate.
    """
    width = vocab_size + 1  # the last column collects the ids without a logit
    lengths = torch.tensor([len(ids) for ids in lists])  # [R]
    ids = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)  # [sum of lengths]
    rows = torch.arange(len(lists)).repeat_interleave(lengths)
    cells = (rows * width + ids.clamp(max=vocab_size)).to(device)
    return torch.bincount(cells, minlength=len(lists) * width).view(-1, width)[:, :vocab_size]
