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
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import visible_tokens

MIN_SHARED_TOKENS = 64  # below that, two products and their sum take longer than reading the prefix again


@dataclass(frozen=True)
class CascadeGroup:
    """Requests of a step, by index, whose first `num_blocks` blocks are the same and hold no new token of theirs."""

    requests: tuple[int, ...]
    num_blocks: int


def cascade_groups(
    tables: list[tuple[int, ...]], query_lens: list[int], kv_lens: list[int], block_size: int
) -> list[CascadeGroup]:
    """Groups of two or more that share at least MIN_SHARED_TOKENS tokens; each request is in one at most."""
    by_first: dict[int, list[int]] = defaultdict(list)
    for index, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        if kv_len - query_len >= MIN_SHARED_TOKENS:
            by_first[tables[index][0]].append(index)
    groups = []
    for first, *others in by_first.values():
        shared = [(index, common_blocks(tables[first], tables[index])) for index in others]
        shared = [(index, count) for index, count in shared if count * block_size >= MIN_SHARED_TOKENS]
        members = (first, *(index for index, _ in shared))
        old = min((kv_lens[i] - query_lens[i]) // block_size for i in members)
        num_blocks = min([old, *(count for _, count in shared)])
        if len(members) > 1 and num_blocks * block_size >= MIN_SHARED_TOKENS:
            groups.append(CascadeGroup(members, num_blocks))
    return groups


def common_blocks(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first entries two tables have in common."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


@dataclass(frozen=True)
class Tails:
    """K/V of M decodes after the prefix of their group, as block tables of one width."""

    rows: Tensor  # [M], where their queries stand
    blocks: Tensor  # [M * B], the null block where a request has fewer
    empty: Tensor  # those of the M * S slots that hold no K/V of the request, but maybe stale values, NaN included
    mask: Tensor  # [M, 1, 1, S], -inf at these, else 0


def find_tails(meta: AttentionMetadata, groups: Sequence[CascadeGroup], query_starts: Sequence[int]) -> Tails | None:
    """The tails of all decodes in groups; None if there are none. query_starts: the first row of every request."""
    members = [(i, group.num_blocks) for group in groups for i in group.requests if meta.query_lens[i] == 1]
    if not members:
        return None
    size, device = meta.block_size, meta.slot_mapping.device
    lengths = [meta.kv_lens[index] - skip * size for index, skip in members]
    width = -(-max(lengths) // size)
    blocks = torch.zeros(len(members), width, dtype=torch.int64)  # [M, B]; what is not filled is the null block
    for row, (index, skip) in enumerate(members):
        tail = meta.tables[index][skip : -(-meta.kv_lens[index] // size)]
        blocks[row, : len(tail)] = torch.tensor(tail)
    hidden = torch.arange(width * size) >= torch.tensor(lengths)[:, None]  # [M, S]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]  # [M, 1, 1, S]
    rows = torch.tensor([query_starts[index] for index, _ in members], device=device)
    empty = hidden.flatten().nonzero()[:, 0]
    return Tails(rows, blocks.flatten().to(device), empty.to(device), mask.to(device))


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
