"""The tensors of paged K/V: a pool on the device, a pool on the host to swap to, and the block operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.kv_cache.interface import BlockCopy, KVOp, SwapIn, SwapOut
from folovllm.models.paged_model import KVShape


class KVStorage:
    """K/V of all layers in blocks. Block 0 is the null block: padding is written there, and it is never read.

    Each pool is [layers, 2, blocks + 1, block_size, Hkv, D], zeroed so that unwritten slots are finite. On a CPU it
    takes memory only as it is written.
    """

    def __init__(
        self,
        kv: KVShape,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        num_blocks: int,
        num_host_blocks: int = 0,
    ) -> None:
        block = (block_size, kv.num_kv_heads, kv.head_dim)
        shape, host_shape = ((kv.num_layers, 2, n + 1, *block) for n in (num_blocks, num_host_blocks))
        if device.type == "cpu":
            self.device_pool, self.host_pool = lazy_zeros(shape, dtype), lazy_zeros(host_shape, dtype)
        else:
            self.device_pool = torch.zeros(shape, dtype=dtype, device=device)
            pin = num_host_blocks > 0  # a GPU copies pinned memory at full speed
            self.host_pool = torch.zeros(host_shape, dtype=dtype, pin_memory=pin)
        self.layers = [LayerKV(layer[0], layer[1]) for layer in self.device_pool]

    def apply(self, ops: Sequence[KVOp], backend: AttentionBackend) -> None:
        """Apply block operations in order, copies by the backend. Raises RuntimeError for any other operation."""
        for _, run in groupby(ops, key=type):
            same = list(run)
            if copies := [(op.src, op.dst) for op in same if isinstance(op, BlockCopy)]:
                backend.copy_blocks(self.device_pool, copies)
            else:
                for op in same:
                    self._swap(op)

    def _swap(self, op: KVOp) -> None:
        if isinstance(op, SwapOut):
            self.host_pool[:, :, op.host_block] = self.device_pool[:, :, op.block].to("cpu")
        elif isinstance(op, SwapIn):
            self.device_pool[:, :, op.block] = self.host_pool[:, :, op.host_block].to(self.device_pool.device)
        else:
            raise RuntimeError(f"a pool of blocks cannot do {op}")


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on the CPU, by numpy's calloc: each page takes memory only when it is first written."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
