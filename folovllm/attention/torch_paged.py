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


class TorchBackend(AttentionBackend):
    """`scaled_dot_product_attention` per request. Raises ValueError for a softcap, which that function has not."""

    name = "torch"

    def __init__(self) -> None:
        # All layers of all steps copy to the same place: a CPU takes as long to get fresh memory as to fill it.
        self._room: LayerKV | None = None

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        """See `AttentionBackend.attend`."""
        if params.softcap is not None:
            raise ValueError(f"softcap={params.softcap} is not valid with attention_backend='torch'; allowed: None")
        places = meta.places
        pool = kv.flat()  # each [slots, Hkv, D]
        copied = pool if places.scattered_blocks is None else self.copy(kv, places.scattered_blocks).flat()
        out = torch.zeros_like(query)  # [T, Hq, D]
        start = 0
        for query_len, in_pool, slots in zip(meta.query_lens, places.in_pool, places.slots, strict=True):
            keys, values = pool if in_pool else copied
            end = start + query_len
            if query_len == 1:
                if params.sliding_window is not None:  # what is before the window need not be read
                    slots = slice(max(slots.start, slots.stop - params.sliding_window), slots.stop)
                out[start:end] = decode(query[start:end], keys[slots], values[slots], params)
            else:
                out[start:end] = prefill(query[start:end], keys[slots], values[slots], params)
            start = end
        return out

    def copy(self, kv: LayerKV, blocks: Tensor) -> LayerKV:
        """The named blocks, [blocks], side by side."""
        room = self._room
        if room is None or len(room.keys) < len(blocks) or room.keys.shape[1:] != kv.keys.shape[1:]:
            shape = (len(blocks) * 5 // 4, *kv.keys.shape[1:])
            room = self._room = LayerKV(kv.keys.new_empty(shape), kv.values.new_empty(shape))
        copied = LayerKV(room.keys[: len(blocks)], room.values[: len(blocks)])
        torch.index_select(kv.keys, 0, blocks, out=copied.keys)
        torch.index_select(kv.values, 0, blocks, out=copied.values)
        return copied


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
