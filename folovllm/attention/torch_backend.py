"""Paged attention in plain torch: the default on a CPU.

One call of torch's own attention per request, on that request's K/V alone: no padding, and nothing is computed for
tokens of others. Two things keep it fast. K/V is read where it lies if a request's blocks are neighbours; that of the
others is copied together, whole blocks at a time. And in a decode the G query heads that share a KV head are stacked as
G rows of one head, so that each key and value is read once:

    queries of one decode token  [Hq, D]  ->  [Hkv, G, D]  x  keys [Hkv, S, D]  ->  scores [Hkv, G, S]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.cascade import (
    CascadeGroup,
    Tails,
    attend_part,
    cascade_groups,
    causal_rows,
    find_tails,
    merge_parts,
    parts_work,
    stack_rows,
    unstack_rows,
)
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import visible_tokens


@dataclass(frozen=True)
class KVPlaces:
    """Per request, a range of slots that holds its K/V in order: in the pool, or in a copy of scattered blocks."""

    in_pool: list[bool]  # whether the range is in the pool, because the request's blocks are neighbours there
    slots: list[slice]
    scattered_blocks: Tensor | None  # [blocks], what the copy is made of, in order


class StepLayout:
    """What the backend derives from a step's metadata: once per step, for all layers."""

    def __init__(self, meta: AttentionMetadata) -> None:
        self.meta = meta
        self.query_starts = [  # the first row of every request
            end - length for end, length in zip(accumulate(meta.query_lens), meta.query_lens, strict=True)
        ]

    @cached_property
    def groups(self) -> list[CascadeGroup]:
        """Requests that share the first part of their K/V."""
        meta = self.meta
        return cascade_groups(meta.tables, meta.query_lens, meta.kv_lens, meta.block_size)

    @cached_property
    def places(self) -> KVPlaces:
        """Where every request's K/V can be read in one piece."""
        return self.find_places([0] * len(self.meta.tables))

    @cached_property
    def places_after_groups(self) -> KVPlaces:
        """The same for what each request has after the prefix of its group. Decodes in groups have `tails` instead."""
        skipped: list[int | None] = [0] * len(self.meta.tables)
        for group in self.groups:
            for index in group.requests:
                skipped[index] = group.num_blocks if self.meta.query_lens[index] > 1 else None
        return self.find_places(skipped)

    @cached_property
    def tails(self) -> Tails | None:
        """What the decodes in groups have after their prefix, padded to one length; None if there are none."""
        return find_tails(self.meta, self.groups, self.query_starts)

    @cached_property
    def group_rows(self) -> list[Tensor]:
        """Where the queries of each group's requests stand: [N]."""
        starts, lengths, device = self.query_starts, self.meta.query_lens, self.meta.slot_mapping.device
        return [
            torch.cat([torch.arange(starts[i], starts[i] + lengths[i], device=device) for i in group.requests])
            for group in self.groups
        ]

    def find_places(self, skipped: Sequence[int | None]) -> KVPlaces:
        """Slot ranges of each request's K/V after its first `skipped` blocks (None: skip the request)."""
        size = self.meta.block_size
        scattered: list[int] = []
        in_pool, slots = [], []
        for full_table, kv_len, skip in zip(self.meta.tables, self.meta.kv_lens, skipped, strict=True):
            if skip is None:
                in_pool.append(True)
                slots.append(slice(0, 0))
                continue
            length = kv_len - skip * size
            table = full_table[skip : -(-kv_len // size)]
            neighbours = table == tuple(range(table[0], table[0] + len(table)))
            start = (table[0] if neighbours else len(scattered)) * size
            in_pool.append(neighbours)
            slots.append(slice(start, start + length))
            if not neighbours:
                scattered += table
        blocks = torch.tensor(scattered, device=self.meta.slot_mapping.device) if scattered else None  # [blocks]
        return KVPlaces(in_pool, slots, blocks)


class TorchBackend(AttentionBackend):
    """`scaled_dot_product_attention` per request. Raises ValueError for a softcap, which it does not support.

    On a CPU a prefix that several requests share is read once for all of them (`folovllm.attention.cascade`).
    """

    name = "torch"

    def __init__(self) -> None:
        self._scattered, self._prefix, self._tails = BlockScratch(), BlockScratch(), BlockScratch()
        self._layout: StepLayout | None = None

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        """See `AttentionBackend.attend`."""
        if params.softcap is not None:
            raise ValueError(f"softcap={params.softcap} is not valid with attention_backend='torch'; allowed: None")
        layout = self._layout_of(meta)
        shares = params.sliding_window is None and query.device.type == "cpu" and bool(layout.groups) and parts_work()
        places = layout.places_after_groups if shares else layout.places
        pool = kv.flat()  # each [slots, Hkv, D]
        blocks = places.scattered_blocks
        copied = pool if blocks is None else self._scattered.copy(kv, blocks).flat()
        out = torch.zeros_like(query)  # [T, Hq, D]
        grouped = {index for group in layout.groups for index in group.requests} if shares else set()
        for index, (start, query_len) in enumerate(zip(layout.query_starts, meta.query_lens, strict=True)):
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
            self._attend_groups(out, query, kv, layout, params, copied)
        return out

    def _layout_of(self, meta: AttentionMetadata) -> StepLayout:
        if self._layout is None or self._layout.meta is not meta:
            self._layout = StepLayout(meta)
        return self._layout

    def _attend_groups(
        self,
        out: Tensor,
        query: Tensor,
        kv: LayerKV,
        layout: StepLayout,
        params: AttentionParams,
        copied: tuple[Tensor, Tensor],
    ) -> None:
        """Fill the rows of `out` that belong to groups: first what each has of its own, then what they share."""
        meta, num_heads, num_kv_heads = layout.meta, query.shape[1], kv.keys.shape[2]
        lse = torch.zeros(query.shape[:2])  # [T, Hq], of the part in `out`
        tails = layout.tails
        if tails is not None:
            flat = self._tails.copy(kv, tails.blocks).flat()  # each [M * S, Hkv, D]
            for copied_slots in flat:
                copied_slots.index_fill_(0, tails.empty, 0)  # a weight of 0 does not make up for NaN
            keys, values = (x.unflatten(0, (len(tails.rows), -1)).transpose(1, 2) for x in flat)  # each [M, Hkv, S, D]
            rows = query[tails.rows].unflatten(1, (num_kv_heads, -1))  # [M, Hkv, G, D]
            part, part_lse = attend_part(rows, keys, values, params.scale, tails.mask.to(query.dtype))
            out[tails.rows], lse[tails.rows] = part.flatten(1, 2), part_lse.flatten(1, 2)
        places, groups = layout.places_after_groups, num_heads // num_kv_heads
        for group, tokens in zip(layout.groups, layout.group_rows, strict=True):  # tokens: [N]
            for index in group.requests:
                start, length = layout.query_starts[index], meta.query_lens[index]
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


class BlockScratch:
    """A buffer for gathered blocks, reused across layers and steps: getting memory takes as long as filling it."""

    def __init__(self) -> None:
        self._kv: LayerKV | None = None

    def copy(self, kv: LayerKV, blocks: Tensor) -> LayerKV:
        """The named blocks, [blocks], side by side."""
        scratch = self._kv
        if scratch is None or len(scratch.keys) < len(blocks) or scratch.keys.shape[1:] != kv.keys.shape[1:]:
            shape = (len(blocks) * 5 // 4, *kv.keys.shape[1:])
            scratch = self._kv = LayerKV(kv.keys.new_empty(shape), kv.values.new_empty(shape))
        copied = LayerKV(scratch.keys[: len(blocks)], scratch.values[: len(blocks)])
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
