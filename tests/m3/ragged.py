"""Ragged batches over blocks, made by hand: dense keys and values per request, and the same ones laid out in a pool.

Everything that no request may read holds NaN: the rest of each last block, the null block, the blocks that a table
names beyond its length, and all blocks between. So a kernel that reads one slot too many cannot be right by luck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata


@dataclass
class Ragged:
    """A step of R requests. keys, values: per request [S, Hkv, D], all its tokens; query: [T, Hq, D], the new ones."""

    lengths: list[tuple[int, int]]  # per request: tokens that have K/V already, and new ones
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    kv: LayerKV
    meta: AttentionMetadata

    def new(self, tensors: list[Tensor]) -> Tensor:
        """The rows of the new tokens, and zeros for padding: [T, Hkv, D]."""
        rows = torch.cat([t[past:] for t, (past, _) in zip(tensors, self.lengths, strict=True)])
        padding = rows.new_zeros(len(self.query) - len(rows), *rows.shape[1:])
        return torch.cat([rows, padding])


def make_ragged(
    lengths: Sequence[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    layout: str = "scattered",
    shared_blocks: int = 0,
    spare_blocks: int = 1,
    padding: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    value_dim: int | None = None,
) -> Ragged:
    """A batch with `lengths`, its past tokens stored, its new ones not.

    heads: query heads and KV heads. layout: "contiguous" gives each request neighbouring blocks, "scattered" any,
    "reversed" descending ones. shared_blocks: whole blocks of the first request's past that all others begin with, as
    far as theirs goes. spare_blocks: poisoned blocks at the end of each table. padding: rows of tokens and of requests.
    value_dim: of a head's values, if that is not head_dim.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query_heads, kv_heads = heads
    keys = [normal(past + new, kv_heads, head_dim) for past, new in lengths]
    value_dim = value_dim or head_dim
    values = [normal(past + new, kv_heads, value_dim) for past, new in lengths]
    counts = [-(-(past + new) // block_size) + spare_blocks for past, new in lengths]
    order = list(range(1, sum(counts) + 1))
    if layout == "scattered":
        order = [order[i] for i in torch.randperm(len(order), generator=generator)]
    elif layout == "reversed":
        order.reverse()
    tables = []
    for count in counts:
        tables.append(order[:count])
        order = order[count:]
    for request, (past, _) in enumerate(lengths[1:], 1):
        common = min(shared_blocks, past // block_size, lengths[0][0] // block_size)
        tables[request][:common] = tables[0][:common]
        for tensors in (keys, values):
            tensors[request][: common * block_size] = tensors[0][: common * block_size]

    shapes = [(sum(counts) + 1, block_size, kv_heads, dim) for dim in (head_dim, value_dim)]
    kv = LayerKV(*(torch.full(shape, math.nan, dtype=dtype) for shape in shapes))
    slots: list[int] = []
    for table, (past, new), key, value in zip(tables, lengths, keys, values, strict=True):
        for position in range(past):
            block, offset = table[position // block_size], position % block_size
            kv.keys[block, offset], kv.values[block, offset] = key[position], value[position]
        slots += [table[p // block_size] * block_size + p % block_size for p in range(past, past + new)]

    num_tokens, starts = len(slots), [0]
    for _, new in lengths:
        starts.append(starts[-1] + new)
    width = max(counts)
    rows = [table + [0] * (width - len(table)) for table in tables]
    meta = AttentionMetadata(
        query_start_loc=torch.tensor(starts + [num_tokens] * padding[1], dtype=torch.int32),
        seq_lens=torch.tensor([past + new for past, new in lengths] + [0] * padding[1], dtype=torch.int32),
        slot_mapping=torch.tensor(slots + [0] * padding[0]),
        block_table=torch.tensor(rows + [[0] * width] * padding[1], dtype=torch.int32),
        block_size=block_size,
        query_lens=[new for _, new in lengths],
        kv_lens=[past + new for past, new in lengths],
        tables=[tuple(table) for table in tables],
    )
    query = normal(num_tokens + padding[0], query_heads, head_dim)
    return Ragged(list(lengths), query, keys, values, kv, meta)


def expected_attention(batch: Ragged, params: AttentionParams) -> Tensor:
    """What every new token should get, by the formula, token by token and head by head in float64: [T, Hq, Dv]."""
    out = []
    start = 0
    for (past, new), keys, values in zip(batch.lengths, batch.keys, batch.values, strict=True):
        group = batch.query.shape[1] // keys.shape[1]
        for row in range(new):
            position = past + row
            first = 0 if params.sliding_window is None else max(0, position - params.sliding_window + 1)
            heads = []
            for head in range(batch.query.shape[1]):
                k = keys[first : position + 1, head // group].double()  # [S, D]
                v = values[first : position + 1, head // group].double()  # [S, D]
                scores = k @ batch.query[start + row, head].double() * params.scale  # [S]
                if params.softcap is not None:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                sink = scores.new_tensor(-math.inf) if params.sinks is None else params.sinks[head].double()
                most = torch.maximum(scores.max(), sink)
                weights = torch.exp(scores - most)
                heads.append(weights @ v / (weights.sum() + torch.exp(sink - most)))
            out.append(torch.stack(heads))
        start += new
    return torch.stack(out)


def attend(backend: AttentionBackend, batch: Ragged, params: AttentionParams) -> Tensor:
    """Write the new tokens and attend: the rows of requests, [T, Hq, Dv]. Padding must come out finite."""
    backend.write(batch.kv, batch.new(batch.keys), batch.new(batch.values), batch.meta)
    out = backend.attend(batch.query, batch.kv, batch.meta, params)
    assert out.shape == (*batch.query.shape[:2], batch.kv.values.shape[-1]) and out.dtype == batch.query.dtype
    num_tokens = sum(batch.meta.query_lens)
    assert torch.isfinite(out[num_tokens:]).all()
    return out[:num_tokens]
