"""Cascade attention: a prefix that several requests share is read once for all of them (Ye et al., FlashInfer, 2024).

Requests that hit the same blocks in the prefix cache have block tables with a common beginning. The K/V of those blocks
is the same memory, so the queries of all these requests are stacked and attend to it in one product. Each request's own
K/V is attended to in a second product, and the two results are merged by their log-sum-exp:

    blocks   [ s | s | s | a | a ]     [ s | s | s | b ]          s: once, for the queries of a and b together
                                                                  a, b: padded to one length, in one call

    out = (exp(lse_1) out_1 + exp(lse_2) out_2) / (exp(lse_1) + exp(lse_2))

This is exact: the softmax over a union of keys is this mean of the softmaxes over its parts, as in flash attention and
split-KV. A sink is a part whose lse is its score and whose out is 0.
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
from folovllm.math_utils import cdiv

MIN_SHARED_TOKENS = 64  # for a shorter prefix, two products and a merge take longer than reading it several times


@dataclass(frozen=True)
class CascadeGroup:
    """Requests of a step, by index, with the same first `num_blocks` blocks, all computed before this step."""

    requests: tuple[int, ...]
    num_blocks: int


def cascade_groups(
    tables: list[tuple[int, ...]], query_lens: list[int], kv_lens: list[int], block_size: int
) -> list[CascadeGroup]:
    """Groups of at least two requests that share at least MIN_SHARED_TOKENS tokens. A request is in at most one."""
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
    """The length of the common beginning of two tables."""
    differs = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


@dataclass(frozen=True)
class Tails:
    """K/V of M decodes after the prefix of their group, as block tables of one width."""

    rows: Tensor  # [M], of their queries
    blocks: Tensor  # [M * B], padded with the null block
    empty: Tensor  # indices among the M * S slots of those without K/V of the request; they may hold NaN
    mask: Tensor  # [M, 1, 1, S], -inf at the empty slots, else 0


def find_tails(meta: AttentionMetadata, groups: Sequence[CascadeGroup], query_starts: Sequence[int]) -> Tails | None:
    """The tails of all decodes in groups; None if there are none. query_starts: the first row of each request."""
    members = [(i, group.num_blocks) for group in groups for i in group.requests if meta.query_lens[i] == 1]
    if not members:
        return None
    size, device = meta.block_size, meta.slot_mapping.device
    lengths = [meta.kv_lens[index] - skip * size for index, skip in members]
    width = cdiv(max(lengths), size)
    blocks = torch.zeros(len(members), width, dtype=torch.int64)  # [M, B]; 0 is the null block
    for row, (index, skip) in enumerate(members):
        tail = meta.tables[index][skip : cdiv(meta.kv_lens[index], size)]
        blocks[row, : len(tail)] = torch.tensor(tail)
    hidden = torch.arange(width * size) >= torch.tensor(lengths)[:, None]  # [M, S]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]  # [M, 1, 1, S]
    rows = torch.tensor([query_starts[index] for index, _ in members], device=device)
    empty = hidden.flatten().nonzero()[:, 0]
    return Tails(rows, blocks.flatten().to(device), empty.to(device), mask.to(device))


def stack_rows(query: Tensor, num_kv_heads: int) -> Tensor:
    """Queries [L, Hq, D] as rows of their KV heads: [1, Hkv, G * L, D], sorted by query head, then token."""
    length, num_heads, dim = query.shape
    grouped = query.view(length, num_kv_heads, num_heads // num_kv_heads, dim)  # [L, Hkv, G, D]
    return grouped.permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, dim)


def unstack_rows(rows: Tensor, length: int) -> Tensor:
    """The inverse, for [1, Hkv, G * L, ...]: [L, Hq, ...]."""
    return rows.reshape(-1, length, *rows.shape[3:]).transpose(0, 1)


def attend_part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: outputs [B, H, L, Dv] and float32 log-sum-exps of the scores [B, H, L].

    query: [B, H, L, D]. keys: [B, H, S, D]. values: [B, H, S, Dv]. mask: added to the scores, [B or 1, 1, L, S].
    """
    if softcap is None and keys.shape == values.shape and query.device.type == "cpu" and parts_work():
        return flash_part(query, keys, values, scale, mask)
    scores = query.float() @ keys.float().transpose(2, 3) * scale  # [B, H, L, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1)  # [B, H, L]
    return ((scores - lse[..., None]).exp() @ values.float()).to(query.dtype), lse


def flash_part(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend_part` by torch's own kernel: for a CPU, values of the keys' size, and no softcap."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse


def merge_parts(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Merge the outputs [L, Hq, D] over two sets of keys, with log-sum-exps [L, Hq], into the output over both."""
    share = torch.sigmoid(other_lse - lse)[..., None]  # [L, Hq, 1]: exp(b) / (exp(a) + exp(b))
    return torch.lerp(out.float(), other.float(), share).to(out.dtype)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Outputs [L, Hq, Dv] over all keys, with log-sum-exps [L, Hq], once each head's sink [Hq] has taken its share."""
    return out if sinks is None else (out * torch.sigmoid(lse - sinks.float())[..., None]).to(out.dtype)


def causal_rows(
    query_len: int, kv_len: int, groups: int, dtype: torch.dtype, sliding_window: int | None = None
) -> Tensor:
    """The causal mask for the rows of `stack_rows`, to be added to scores: [1, 1, G * L, S]."""
    hidden = ~visible_tokens(query_len, kv_len, sliding_window)  # [L, S]
    mask = torch.zeros(query_len, kv_len, dtype=dtype).masked_fill_(hidden, -math.inf)
    return mask.repeat(groups, 1)[None, None]


@cache
def parts_work() -> bool:
    """Whether this torch has the private function that `flash_part` calls, with the meaning that we rely on."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, 2, n, 16, generator=generator) for n in (3, 7, 7))
    mask = torch.zeros(1, 1, 3, 7)
    mask[..., 5:] = -math.inf
    try:
        out, lse = flash_part(query, keys, values, 0.5, mask)
    except (AttributeError, RuntimeError, TypeError):
        return False
    scores = query @ keys.transpose(2, 3) * 0.5 + mask
    right = torch.allclose(out, scores.softmax(-1) @ values, atol=1e-5)
    return right and torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)
