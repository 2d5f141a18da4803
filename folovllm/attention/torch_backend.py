"""Paged attention in plain torch: the default on a CPU.

One call of torch's own attention per request, on that request's K/V alone: nothing is padded, and nothing is computed
for other requests' tokens. Two things keep it fast. Consecutive blocks are read in place; all other blocks of a step
are gathered in one copy. And in a decode the G query heads that share a KV head become G rows of one head, so that
each key and value is read once:

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
    with_sinks,
)
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import visible_tokens
from folovllm.math_utils import cdiv

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KVPlaces:
    """Per request, a range of slots that holds its K/V in order: in the pool, or in a copy of scattered blocks."""

    in_pool: list[bool]  # True if the request's blocks are consecutive
    slots: list[slice]
    scattered_blocks: Tensor | None  # [blocks] to gather, in order

    def read(self, index: int, pool: KeysValues, gathered: KeysValues) -> KeysValues:
        """A request's keys and values, each [S, Hkv, D]: views."""
        keys, values = pool if self.in_pool[index] else gathered
        return keys[self.slots[index]], values[self.slots[index]]


class StepLayout:
    """What the backend derives from a step's metadata: once per step, for all layers."""

    def __init__(self, meta: AttentionMetadata) -> None:
        self.meta = meta
        self.query_starts = [0, *accumulate(meta.query_lens)][:-1]  # the first row of each request

    @cached_property
    def groups(self) -> list[CascadeGroup]:
        return cascade_groups(self.meta.tables, self.meta.query_lens, self.meta.kv_lens, self.meta.block_size)

    @cached_property
    def places(self) -> KVPlaces:
        return self.find_places([0] * len(self.meta.tables))

    @cached_property
    def places_after_groups(self) -> KVPlaces:
        """Places of the K/V after each group's shared prefix. Decodes in groups have `tails` instead."""
        skipped: list[int | None] = [0] * len(self.meta.tables)
        for group in self.groups:
            for index in group.requests:
                skipped[index] = group.num_blocks if self.meta.query_lens[index] > 1 else None
        return self.find_places(skipped)

    @cached_property
    def tails(self) -> Tails | None:
        return find_tails(self.meta, self.groups, self.query_starts)

    @cached_property
    def group_rows(self) -> list[Tensor]:
        """The rows of each group's queries: [N]."""
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
            table = full_table[skip : cdiv(kv_len, size)]
            consecutive = table == tuple(range(table[0], table[0] + len(table)))
            start = (table[0] if consecutive else len(scattered)) * size
            in_pool.append(consecutive)
            slots.append(slice(start, start + length))
            if not consecutive:
                scattered += table
        blocks = torch.tensor(scattered, device=self.meta.slot_mapping.device) if scattered else None  # [blocks]
        return KVPlaces(in_pool, slots, blocks)


class TorchBackend(AttentionBackend):
    """`scaled_dot_product_attention` per request, or plain products where it does not know the formula.

    On a CPU a prefix that several requests share is read once for all of them (`folovllm.attention.cascade`).
    """

    name = "torch"

    def __init__(self) -> None:
        self._scattered, self._prefix, self._tails = BlockScratch(), BlockScratch(), BlockScratch()
        self._layout: StepLayout | None = None

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        if self._layout is None or self._layout.meta is not meta:
            self._layout = StepLayout(meta)
        layout = self._layout
        shares = params.sliding_window is None and query.device.type == "cpu" and bool(layout.groups) and parts_work()
        places = layout.places_after_groups if shares else layout.places
        pool = kv.flat()  # each [slots, Hkv, D]
        blocks = places.scattered_blocks
        gathered = pool if blocks is None else self._scattered.gather(kv, blocks).flat()
        out = query.new_zeros(*query.shape[:2], kv.values.shape[-1])  # [T, Hq, Dv]
        grouped = {index for group in layout.groups for index in group.requests} if shares else set()
        for index, (start, query_len) in enumerate(zip(layout.query_starts, meta.query_lens, strict=True)):
            if index not in grouped:
                rows = slice(start, start + query_len)
                attend_one = decode if query_len == 1 else prefill
                if params.softcap is not None or params.sinks is not None:
                    attend_one = attend_plainly
                out[rows] = attend_one(query[rows], *places.read(index, pool, gathered), params)
        if shares:
            self._attend_groups(out, query, kv, layout, params, gathered)
        return out

    def _attend_groups(
        self,
        out: Tensor,
        query: Tensor,
        kv: LayerKV,
        layout: StepLayout,
        params: AttentionParams,
        gathered: KeysValues,
    ) -> None:
        """Fill the rows of `out` that belong to groups: first over each request's own K/V, then over the shared."""
        meta, pool, num_kv_heads = layout.meta, kv.flat(), kv.keys.shape[2]
        scale, softcap = params.scale, params.softcap
        lse = torch.zeros(query.shape[:2])  # [T, Hq], of the part in `out`
        tails = layout.tails
        if tails is not None:
            flat = self._tails.gather(kv, tails.blocks).flat()  # each [M * S, Hkv, D]
            for part in flat:
                part.index_fill_(0, tails.empty, 0)  # these may hold NaN, and 0 * NaN is NaN
            keys, values = (x.unflatten(0, (len(tails.rows), -1)).transpose(1, 2) for x in flat)  # each [M, Hkv, S, D]
            rows = query[tails.rows].unflatten(1, (num_kv_heads, -1))  # [M, Hkv, G, D]
            part, part_lse = attend_part(rows, keys, values, scale, tails.mask.to(query.dtype), softcap)
            out[tails.rows], lse[tails.rows] = part.flatten(1, 2), part_lse.flatten(1, 2)
        for group, tokens in zip(layout.groups, layout.group_rows, strict=True):  # tokens: [N]
            for index in group.requests:
                start, length = layout.query_starts[index], meta.query_lens[index]
                if length > 1:
                    keys, values = heads_first(*layout.places_after_groups.read(index, pool, gathered))
                    mask = causal_rows(length, keys.shape[2], query.shape[1] // num_kv_heads, query.dtype)
                    stacked = stack_rows(query[start : start + length], num_kv_heads)
                    part, part_lse = attend_part(stacked, keys, values, scale, mask, softcap)
                    out[start : start + length] = unstack_rows(part, length)
                    lse[start : start + length] = unstack_rows(part_lse, length)
            shared = meta.tables[group.requests[0]][: group.num_blocks]
            if shared == tuple(range(shared[0], shared[0] + len(shared))):
                slots = slice(shared[0] * meta.block_size, (shared[-1] + 1) * meta.block_size)
                keys, values = heads_first(pool[0][slots], pool[1][slots])
            else:
                keys, values = heads_first(*self._prefix.gather(kv, torch.tensor(shared)).flat())
            stacked = stack_rows(query[tokens], num_kv_heads)  # [1, Hkv, G * N, D]
            both = attend_part(stacked, keys, values, scale, softcap=softcap)
            part, part_lse = (unstack_rows(x, len(tokens)) for x in both)
            merged = merge_parts(out[tokens], lse[tokens], part, part_lse)  # [N, Hq, Dv]
            out[tokens] = with_sinks(merged, torch.logaddexp(lse[tokens], part_lse), params.sinks)


class BlockScratch:
    """A buffer for gathered blocks, reused across layers and steps: allocating one takes as long as filling it."""

    def __init__(self) -> None:
        self._kv: LayerKV | None = None

    def gather(self, kv: LayerKV, blocks: Tensor) -> LayerKV:
        """The named blocks, [blocks], one after the other."""
        scratch = self._kv
        shapes = kv.keys.shape[1:], kv.values.shape[1:]
        if (
            scratch is None
            or len(scratch.keys) < len(blocks)
            or (scratch.keys.shape[1:], scratch.values.shape[1:]) != shapes
        ):
            size = len(blocks) * 5 // 4
            keys, values = (x.new_empty(size, *shape) for x, shape in zip((kv.keys, kv.values), shapes, strict=True))
            scratch = self._kv = LayerKV(keys, values)
        gathered = LayerKV(scratch.keys[: len(blocks)], scratch.values[: len(blocks)])
        torch.index_select(kv.keys, 0, blocks, out=gathered.keys)
        torch.index_select(kv.values, 0, blocks, out=gathered.values)
        return gathered


def heads_first(keys: Tensor, values: Tensor) -> KeysValues:
    """[S, Hkv, D] each, as views of [1, Hkv, S, D]."""
    return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]


def decode(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """The last of S tokens, [1, Hq, D], over keys [S, Hkv, D] and values [S, Hkv, Dv]: [1, Hq, Dv]."""
    _, num_heads, dim = query.shape
    if params.sliding_window is not None:
        keys, values = keys[-params.sliding_window :], values[-params.sliding_window :]
    rows = query.view(1, keys.shape[1], num_heads // keys.shape[1], dim)  # [1, Hkv, G, D]
    return scaled_dot_product_attention(rows, *heads_first(keys, values), scale=params.scale).view(1, num_heads, -1)


def prefill(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """The last L of S tokens, [L, Hq, D], over keys [S, Hkv, D] and values [S, Hkv, Dv]: [L, Hq, Dv]."""
    query_len, kv_len = query.shape[0], keys.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))  # [1, H, L or S, D]
    causal = query_len == kv_len and (params.sliding_window is None or kv_len <= params.sliding_window)
    # torch's causal mask is aligned to the first key, so it is right only if the request starts in this step.
    mask = None if causal else visible_tokens(query_len, kv_len, params.sliding_window).to(query.device)  # [L, S]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=params.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def attend_plainly(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """`decode` and `prefill` in plain products, with a softcap and sinks: queries [L, Hq, D] to [L, Hq, Dv]."""
    query_len, num_kv_heads = len(query), keys.shape[1]
    if params.sliding_window is not None:  # no query of these sees more
        seen = params.sliding_window + query_len - 1
        keys, values = keys[-seen:], values[-seen:]
    mask = causal_rows(query_len, len(keys), query.shape[1] // num_kv_heads, query.dtype, params.sliding_window).to(
        query.device
    )
    part = attend_part(stack_rows(query, num_kv_heads), *heads_first(keys, values), params.scale, mask, params.softcap)
    out, lse = (unstack_rows(x, query_len) for x in part)
    return with_sinks(out, lse, params.sinks)
