"""The filters of random sampling, in the order in which the sampler applies them.

Each takes float32 logits `[R, V]` and one parameter per row `[R, 1]` and returns new logits `[R, V]`. A
dropped token has the logit -inf, which is probability 0 after the softmax. Read beside vLLM's
`v1/sample/logits_processor/builtin.py` (min-p) and `v1/sample/ops/topk_topp_sampler.py` (top-k and top-p).
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

    Tokens that tie with the k-th all stay: which of them came k-th is an accident of sorting.
    """
    top_k = top_k.clamp(max=logits.shape[-1])
    largest = logits.topk(int(top_k.max()), dim=-1).values  # [R, K], descending
    return logits.masked_fill(logits < largest.gather(1, top_k - 1), NEG_INF)


def apply_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `top_p` `[R, 1]` (arXiv 1904.09751).

    Going up from the least likely token, drop while the mass dropped is at most 1 - top_p; the likeliest
    always stays. A tie at the edge is cut, lower ids first: a set that has reached top_p needs no more.
    """
    ascending, token_ids = logits.sort(dim=-1, stable=True)  # [R, V] each
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[:, -1] = False
    return logits.masked_fill(drop.scatter(1, token_ids, drop), NEG_INF)
