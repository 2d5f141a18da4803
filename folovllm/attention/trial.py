"""Whether an attention backend can run here, found out when the engine is made and not in a step."""

from __future__ import annotations

import torch

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata


@torch.inference_mode()
def why_it_cannot_run(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> str | None:
    """Run a decode, a prefill and block copies in this shape; the error in one line, None if there is none.

    This is where a backend compiles, so a missing compiler shows.
    """
    try:
        pool = torch.zeros(1, 2, 3, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
        kv = LayerKV(pool[0, 0], pool[0, 1])
        for length in (1, min(2, block_size)):  # a decode, and a prefill
            meta = AttentionMetadata(
                torch.tensor([0, length], dtype=torch.int32, device=device),
                torch.tensor([length], dtype=torch.int32, device=device),
                torch.arange(block_size, block_size + length, device=device),
                torch.tensor([[1]], dtype=torch.int32, device=device),
                block_size,
                [length],
                [length],
                [(1,)],
            )
            new = torch.ones(length, num_kv_heads, head_dim, dtype=dtype, device=device)  # [L, Hkv, D]
            backend.write(kv, new, new, meta)
            query = torch.ones(length, num_heads, head_dim, dtype=dtype, device=device)  # [L, Hq, D]
            out = backend.attend(query, kv, meta, AttentionParams(head_dim**-0.5))  # [L, Hq, D]
            backend.copy_blocks(pool, [(1, 2)])
            if not bool((out - 1).abs().max() < 0.1):  # every value is 1, and so is any mean of them
                return f"its attention over values of 1 is {out.flatten()[0].item()}"
    except Exception as error:  # whatever a compiler or a driver raises
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None
