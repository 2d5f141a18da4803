"""The attention formula, one request at a time: slow, obvious, and the oracle of the other backends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata


class ReferenceBackend(AttentionBackend):
    """softmax(q k^T * scale + mask) v, dense, in float32 or in the wider `dtype`, with softcaps and sinks."""

    name = "reference"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        out = query.new_zeros(*query.shape[:2], kv.values.shape[-1])  # [T, Hq, Dv]
        start = 0
        for index, (query_len, kv_len) in enumerate(zip(meta.query_lens, meta.kv_lens, strict=True)):
            # Token j of a request is in block table[j // block_size], at offset j % block_size.
            positions = torch.arange(kv_len, device=query.device)  # [S]
            blocks = meta.block_table[index, positions // meta.block_size].long()  # [S]
            keys = kv.keys[blocks, positions % meta.block_size].to(self.dtype)  # [S, Hkv, D]
            values = kv.values[blocks, positions % meta.block_size].to(self.dtype)  # [S, Hkv, Dv]
            queries = query[start : start + query_len].to(self.dtype)  # [L, Hq, D]
            group = queries.shape[1] // keys.shape[1]
            keys, values = (
                keys.repeat_interleave(group, dim=1),
                values.repeat_interleave(group, dim=1),
            )  # [S, Hq, D or Dv]
            scores = torch.einsum("lhd,shd->hls", queries, keys) * params.scale  # [Hq, L, S]
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            visible = visible_tokens(query_len, kv_len, params.sliding_window).to(query.device)  # [L, S]
            scores = scores.masked_fill(~visible, -math.inf)
            if params.sinks is not None:  # one more score per row, without a value
                sinks = params.sinks.to(self.dtype)[:, None, None].expand(-1, query_len, 1)  # [Hq, L, 1]
                scores = torch.cat([scores, sinks], dim=-1)  # [Hq, L, S + 1]
            weights = scores.softmax(dim=-1)[..., :kv_len]  # [Hq, L, S]
            out[start : start + query_len] = torch.einsum("hls,shd->lhd", weights, values).to(query.dtype)
            start += query_len
        return out


def visible_tokens(query_len: int, kv_len: int, sliding_window: int | None) -> Tensor:
    """Which of `kv_len` tokens each of the last `query_len` attends to, itself included: [L, S] bool."""
    query_positions = torch.arange(kv_len - query_len, kv_len)[:, None]  # [L, 1]
    kv_positions = torch.arange(kv_len)[None]  # [1, S]
    visible = kv_positions <= query_positions
    if sliding_window is not None:
        visible &= kv_positions > query_positions - sliding_window
    return visible
