"""The decode part of `TorchBackend` as one function that torch's compiler fuses: `attention_backend="torch-compiled"`.

It is written as if every request's K/V were gathered, padded to the longest, multiplied and summed. Compiled, none of
these tensors is ever made: one loop reads each key and value where it lies. The first step takes seconds and needs a
C++ compiler, so this is for those who ask for it. Lengths are dynamic, so that a handful of graphs serves all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.torch_paged import TorchBackend

DecodeFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]


class TorchCompiledBackend(AttentionBackend):
    """Compiled for steps that only decode; others take `TorchBackend`."""

    name = "torch-compiled"

    def __init__(self) -> None:
        self.eager = TorchBackend()

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        """See `AttentionBackend.attend`."""
        if max(meta.query_lens) > 1 or params.softcap is not None or len(meta.query_lens) < len(query):
            return self.eager.attend(query, kv, meta, params)
        window = params.sliding_window or 0
        table = meta.block_table[:, : -(-max(meta.kv_lens) // meta.block_size)]  # [R, B] as wide as this step needs
        return compiled()(query, kv.keys, kv.values, table, meta.seq_lens, params.scale, window)


@cache
def compiled() -> DecodeFunction:
    """`decode_attention` through torch's compiler; nothing is compiled before its first call."""
    function: DecodeFunction = torch.compile(decode_attention, dynamic=True, fullgraph=True)
    return function


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """One token per request, [R, Hq, D], over pools [blocks, block_size, Hkv, D] by block_table [R, B]: [R, Hq, D].

    window: how many tokens are seen, itself included; 0 for all.
    """
    num_requests, num_heads, dim = query.shape
    num_kv_heads = keys.shape[2]
    width = block_table.shape[1] * keys.shape[1]  # S: slots that the tables name, padding included
    k = keys[block_table].reshape(num_requests, width, num_kv_heads, 1, dim)  # [R, S, Hkv, 1, D]
    v = values[block_table].reshape(num_requests, width, num_kv_heads, 1, dim)  # [R, S, Hkv, 1, D]
    q = query.view(num_requests, 1, num_kv_heads, -1, dim)  # [R, 1, Hkv, G, D]
    scores = (q.float() * k.float()).sum(-1) * scale  # [R, S, Hkv, G]
    positions = torch.arange(width, device=query.device)  # [S]
    visible = positions < seq_lens[:, None]  # [R, S]
    if window:
        visible &= positions >= seq_lens[:, None] - window
    weights = scores.masked_fill(~visible[:, :, None, None], float("-inf")).softmax(dim=1)  # [R, S, Hkv, G]
    out = (weights[..., None] * v.float()).sum(1)  # [R, Hkv, G, D]
    return out.reshape(num_requests, num_heads, dim).to(query.dtype)
