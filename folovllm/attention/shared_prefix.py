"""A prefix that several requests share is read once for all of them (cascade attention: Ye et al., FlashInfer, 2024).

Requests that found the same blocks in the prefix cache have tables that begin alike. Their keys and values before that
point are the same memory, so the queries of all of them are stacked and meet it in one product. What each has of its
own comes in a second product, and the two are put together by their log-sum-exp:

    blocks   [ s | s | s | a | a ]     [ s | s | s | b ]          s: once, for the queries of a and b together
                                                                  a, b: padded to one length, in one call

    out = (exp(lse_1) out_1 + exp(lse_2) out_2) / (exp(lse_1) + exp(lse_2))

This is exact: softmax over a union is that mean of the softmaxes over its parts, as in flash attention and split-KV.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from folovllm.attention.reference import visible_tokens


def stack_rows(query: Tensor, num_kv_heads: int) -> Tensor:
    """Queries [L, Hq, D] as rows of the KV heads that they read: [1, Hkv, G * L, D], a head's tokens together."""
    length, num_heads, dim = query.shape
    grouped = query.view(length, num_kv_heads, num_heads // num_kv_heads, dim)  # [L, Hkv, G, D]
    return grouped.permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, dim)


def unstack_rows(rows: Tensor, length: int) -> Tensor:
    """The inverse, for [1, Hkv, G * L, ...]: [L, Hq, ...]."""
    rest = rows.shape[3:]
    heads = rows.reshape(-1, length, *rest)  # [Hq, L, ...]
    return heads.transpose(0, 1)


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys: outputs [B, H, L, D] and float32 log-sum-exps [B, H, L].

    query: [B, H, L, D]. keys, values: [B, H, S, D]. mask: added to the scores, [B or 1, 1, L, S].
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse


def merge_parts(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Outputs [L, Hq, D] over two parts, and their log-sum-exps [L, Hq], as one output over both."""
    share = torch.sigmoid(other_lse - lse)[..., None]  # [L, Hq, 1]: exp(b) / (exp(a) + exp(b))
    return torch.lerp(out.float(), other.float(), share).to(out.dtype)


def causal_rows(query_len: int, kv_len: int, groups: int, dtype: torch.dtype) -> Tensor:
    """The causal mask of `stack_rows`' rows, to be added: [1, 1, G * L, S]."""
    hidden = ~visible_tokens(query_len, kv_len, None)  # [L, S]
    mask = torch.zeros(query_len, kv_len, dtype=dtype).masked_fill_(hidden, -math.inf)
    return mask.repeat(groups, 1)[None, None]


@cache
def parts_work() -> bool:
    """Whether this torch has the function under `attend_part`, and it means what we think. It is not a public one."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, 2, n, 16, generator=generator) for n in (3, 7, 7))
    mask = torch.zeros(1, 1, 3, 7)
    mask[..., 5:] = -math.inf
    try:
        out, lse = attend_part(query, keys, values, 0.5, mask)
    except (AttributeError, RuntimeError, TypeError):
        return False
    scores = query @ keys.transpose(2, 3) * 0.5 + mask
    right = torch.allclose(out, scores.softmax(-1) @ values, atol=1e-5)
    return right and torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)
