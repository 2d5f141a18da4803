"""The tensors of paged K/V: a pool per layer on the device, one on the host to swap to, and the block operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from folovllm.attention.backend import LayerKV
from folovllm.kv_cache.interface import BlockCopy, KVOp, SwapIn, SwapOut


class KVStorage:
    """K/V of all layers in blocks. Block 0 is the null block: padding is written there and nobody reads it.

    Each pool is [layers, 2, blocks + 1, block_size, Hkv, D], zeroed so that what was never written is finite.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        block = (block_size, num_kv_heads, head_dim)
        self.device_pool = torch.zeros(num_layers, 2, num_blocks + 1, *block, dtype=dtype, device=device)
        pin = device.type == "cuda" and num_host_blocks > 0  # pinned memory is what a GPU copies at full speed
        self.host_pool = torch.zeros(num_layers, 2, num_host_blocks + 1, *block, dtype=dtype, pin_memory=pin)
        self.layers = [LayerKV(layer[0], layer[1]) for layer in self.device_pool]

    def apply(self, ops: Sequence[KVOp]) -> None:
        """Do block operations in order. Raises RuntimeError for one that is not about blocks."""
        for op in ops:
            if isinstance(op, BlockCopy):
                self.device_pool[:, :, op.dst] = self.device_pool[:, :, op.src]
            elif isinstance(op, SwapOut):
                self.host_pool[:, :, op.host_block] = self.device_pool[:, :, op.block].to("cpu")
            elif isinstance(op, SwapIn):
                self.device_pool[:, :, op.block] = self.host_pool[:, :, op.host_block].to(self.device_pool.device)
            else:
                raise RuntimeError(f"a pool of blocks cannot do {op}")
