"""Paged attention in plain torch: the default on a CPU.

One call of torch's own attention per request, on that request's K/V alone: no padding, and nothing is computed for
tokens of others. Two things keep it fast. K/V is read where it lies if a request's blocks are neighbours; that of the
others is copied together, whole blocks at a time. And in a decode the G query heads that share a KV head are stacked as
G rows of one head, so that each key and value is read once:

    queries of one decode token  [Hq, D]  ->  [Hkv, G, D]  x  keys [Hkv, S, D]  ->  scores [Hkv, G, S]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import visible_tokens
from folovllm.attention.shared_prefix import (
    attend_part,
    causal_rows,
    merge_parts,
    parts_work,
    stack_rows,
    unstack_rows,
)


class TorchBackend(AttentionBackend):
    """`scaled_dot_product_attention` per request. Raises ValueError for a softcap, which that function has not.

    On a CPU a prefix that several requests share is read once for all of them (`folovllm.attention.shared_prefix`).
    """

    name = "torch"

    def __init__(self) -> None:
        self._scattered, self._prefix, self._tails = Room(), Room(), Room()

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        """See `AttentionBackend.attend`."""
        if params.softcap is not None:
            raise ValueError(f"softcap={params.softcap} is not valid with attention_backend='torch'; allowed: None")
        shares = params.sliding_window is None and query.device.type == "cpu" and bool(meta.groups) and parts_work()
        places = meta.places_after_groups if shares else meta.places
        pool = kv.flat()  # each [slots, Hkv, D]
        blocks = places.scattered_blocks
        copied = pool if blocks is None else self._scattered.copy(kv, blocks).flat()
        out = torch.zeros_like(query)  # [T, Hq, D]
        grouped = {index for group in meta.groups for index in group.requests} if shares else set()
        for index, (start, query_len) in enumerate(zip(meta.query_starts, meta.query_lens, strict=True)):
            if index in grouped:
                continue
            keys, values = pool if places.in_pool[index] else copied
            slots, end = places.slots[index], start + query_len
            if query_len == 1:
                if params.sliding_window is not None:  # what is before the window need not be read
                    slots = slice(max(slots.start, slots.stop - params.sliding_window), slots.stop)
                out[start:end] = decode(query[start:end], keys[slots], values[slots], params)
            else:
                out[start:end] = prefill(query[start:end], keys[slots], values[slots], params)
        if shares:
            self._attend_groups(out, query, kv, meta, params, copied)
        return out

    def _attend_groups(
        self,
        out: Tensor,
        query: Tensor,
        kv: LayerKV,
        meta: AttentionMetadata,
        params: AttentionParams,
        copied: tuple[Tensor, Tensor],
    ) -> None:
        """Fill the rows of `out` that belong to groups: first what each has of its own, then what they share."""
        num_heads, num_kv_heads = query.shape[1], kv.keys.shape[2]
        lse = torch.zeros(query.shape[:2])  # [T, Hq], of the part in `out`
        if meta.tails is not None:
            tails = meta.tails
            flat = self._tails.copy(kv, tails.blocks).flat()  # each [M * S, Hkv, D]
            for copied_slots in flat:
                copied_slots.index_fill_(0, tails.empty, 0)  # a weight of 0 does not make up for NaN
            keys, values = (x.unflatten(0, (len(tails.rows), -1)).transpose(1, 2) for x in flat)  # each [M, Hkv, S, D]
            rows = query[tails.rows].unflatten(1, (num_kv_heads, -1))  # [M, Hkv, G, D]
            part, part_lse = attend_part(rows, keys, values, params.scale, tails.mask.to(query.dtype))
            out[tails.rows], lse[tails.rows] = part.flatten(1, 2), part_lse.flatten(1, 2)
        places, groups = meta.places_after_groups, num_heads // num_kv_heads
        for group, tokens in zip(meta.groups, meta.group_rows, strict=True):  # tokens: [N]
            for index in group.requests:
                start, length = meta.query_starts[index], meta.query_lens[index]
                if length > 1:
                    keys, values = heads_first(kv.flat() if places.in_pool[index] else copied, places.slots[index])
                    mask = causal_rows(length, keys.shape[2], groups, query.dtype)
                    rows = stack_rows(query[start : start + length], num_kv_heads)
                    part, part_lse = attend_part(rows, keys, values, params.scale, mask)
                    out[start : start + length] = unstack_rows(part, length)
                    lse[start : start + length] = unstack_rows(part_lse, length)
            shared = meta.tables[group.requests[0]][: group.num_blocks]
            if shared == tuple(range(shared[0], shared[0] + len(shared))):
                slots = slice(shared[0] * meta.block_size, (shared[-1] + 1) * meta.block_size)
                keys, values = heads_first(kv.flat(), slots)
            else:
                keys, values = heads_first(self._prefix.copy(kv, torch.tensor(shared)).flat(), slice(None))
            rows = stack_rows(query[tokens], num_kv_heads)  # [1, Hkv, G * N, D]
            part, part_lse = (unstack_rows(x, len(tokens)) for x in attend_part(rows, keys, values, params.scale))
            out[tokens] = merge_parts(out[tokens], lse[tokens], part, part_lse)


class Room:
    """A place for copies of blocks. All layers of all steps use it: a CPU takes as long to get memory as to fill it."""

    def __init__(self) -> None:
        self._kv: LayerKV | None = None

    def copy(self, kv: LayerKV, blocks: Tensor) -> LayerKV:
        """The named blocks, [blocks], side by side."""
        room = self._kv
        if room is None or len(room.keys) < len(blocks) or room.keys.shape[1:] != kv.keys.shape[1:]:
            shape = (len(blocks) * 5 // 4, *kv.keys.shape[1:])
            room = self._kv = LayerKV(kv.keys.new_empty(shape), kv.values.new_empty(shape))
        copied = LayerKV(room.keys[: len(blocks)], room.values[: len(blocks)])
        torch.index_select(kv.keys, 0, blocks, out=copied.keys)
        torch.index_select(kv.values, 0, blocks, out=copied.values)
        return copied


def heads_first(kv: tuple[Tensor, Tensor], slots: slice) -> tuple[Tensor, Tensor]:
    """Keys and values of some slots, from [slots, Hkv, D] each: views of [1, Hkv, S, D]."""
    return kv[0][slots].transpose(0, 1)[None], kv[1][slots].transpose(0, 1)[None]


def decode(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """One token, [1, Hq, D], sees all of the S keys and values it is given, each [S, Hkv, D]: [1, Hq, D]."""
    _, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    rows = query.view(1, num_kv_heads, num_heads // num_kv_heads, dim)  # [1, Hkv, G, D]
    k, v = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # [1, Hkv, S, D]
    return scaled_dot_product_attention(rows, k, v, scale=params.scale).view(1, num_heads, dim)


def prefill(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """The last L of S tokens, [L, Hq, D], over keys and values of [S, Hkv, D]: [L, Hq, D]."""
    query_len, kv_len = query.shape[0], keys.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))  # [1, H, L or S, D]
    causal = query_len == kv_len and (params.sliding_window is None or kv_len <= params.sliding_window)
    # torch's own causal mask starts at the first key: it is right only for a request that begins here.
    mask = None if causal else visible_tokens(query_len, kv_len, params.sliding_window).to(query.device)  # [L, S]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=params.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
