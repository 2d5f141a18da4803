"""The decode part of `TorchBackend` as one function that torch's compiler fuses: `attention_backend="torch-compiled"`.

It is written as if every request's K/V were gathered, padded to the longest, multiplied and summed. Compiled, none of
these tensors is ever made: one loop reads each key and value where it lies. The first step takes seconds and needs a
C++ compiler, so this is for those who ask for it.

A graph is compiled for the sizes that it has seen, and again for those that it has not, so all that changes from step
to step or from layer to layer has to be said: requests and lengths are marked as dynamic, and windows and scales are
tensors. What is left is a graph for one request, which torch's compiler takes for a constant, and one for several.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.torch_backend import TorchBackend

DecodeFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class TorchCompiledBackend(AttentionBackend):
    """Compiled for steps that only decode; others take `TorchBackend`.

    compiler: what `torch.compile` calls its backend; "eager" for one that traces graphs and compiles none.
    """

    name = "torch-compiled"

    def __init__(self, compiler: str | Callable[..., Any] = "inductor") -> None:
        self.eager = TorchBackend()
        self.compiler = compiler

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        """See `AttentionBackend.attend`."""
        if max(meta.query_lens) > 1 or params.softcap is not None or len(meta.query_lens) < len(query):
            return self.eager.attend(query, kv, meta, params)
        # No wider than this step needs. But a size of 1 would be a constant, and one more graph; and so would be the
        # width of the table that this is a part of, of which a copy knows nothing.
        width = max(2, -(-max(meta.kv_lens) // meta.block_size))
        table = meta.block_table[:, :width].clone(memory_format=torch.contiguous_format)  # [R, B]
        ends = meta.seq_lens  # [R]
        starts = torch.zeros_like(ends) if params.sliding_window is None else ends - params.sliding_window  # [R]
        for tensor, dims in ((query, 1), (kv.keys, 1), (kv.values, 1), (table, 2), (starts, 1), (ends, 1)):
            for dim in range(dims):
                if tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
        scale = torch.tensor(params.scale, device=query.device)
        out = compiled(self.compiler)(query, kv.keys, kv.values, table, starts, ends, scale)
        # Slots beside a request's own get a weight of 0. Somebody else's NaN may stand there, and 0 * NaN is NaN.
        # Masking values would make every step slower; a look at the result does not, and `eager` reads no other slots.
        return self.eager.attend(query, kv, meta, params) if out.isnan().any() else out


@cache
def compiled(compiler: str | Callable[..., Any]) -> DecodeFunction:
    """`decode_attention` through torch's compiler; nothing is compiled before its first call."""
    function: DecodeFunction = torch.compile(decode_attention, fullgraph=True, backend=compiler)
    return function


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    starts: Tensor,
    ends: Tensor,
    scale: Tensor,
) -> Tensor:
    """One token per request, [R, Hq, D], over pools [blocks, block_size, Hkv, D] by block_table [R, B]: [R, Hq, D].

    starts, ends: [R], the keys that each sees, the first and the one after the last. scale: a number, as a tensor.
    """
    num_requests, num_heads, dim = query.shape
    num_kv_heads = keys.shape[2]
    width = block_table.shape[1] * keys.shape[1]  # S: slots that the tables name, padding included
    k = keys[block_table].reshape(num_requests, width, num_kv_heads, 1, dim)  # [R, S, Hkv, 1, D]
    v = values[block_table].reshape(num_requests, width, num_kv_heads, 1, dim)  # [R, S, Hkv, 1, D]
    q = query.view(num_requests, 1, num_kv_heads, -1, dim)  # [R, 1, Hkv, G, D]
    scores = (q.float() * k.float()).sum(-1) * scale  # [R, S, Hkv, G]
    positions = torch.arange(width, device=query.device)  # [S]
    hidden = (positions < starts[:, None]) | (positions >= ends[:, None])  # [R, S]
    hidden = hidden[:, :, None, None]  # [R, S, 1, 1]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=1)  # [R, S, Hkv, G]
    out = (weights[..., None] * v.float()).sum(1)  # [R, Hkv, G, D]
    return out.reshape(num_requests, num_heads, dim).to(query.dtype)
