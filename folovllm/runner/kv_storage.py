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

    A pool is [layers, 2, blocks + 1, block_size, Hkv, D]: keys and values. If their sizes differ, it is two tensors
    of [layers, 1, blocks + 1, block_size, Hkv, D or Dv]. All are zeroed so that unwritten slots are finite; on a CPU
    they take memory only as they are written.
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
        def make_pools(num_blocks: int, on_host: bool) -> list[Tensor]:
            block = (num_blocks + 1, block_size, kv.num_kv_heads)
            key_dim, value_dim = kv.head_dims
            parts = [(2, key_dim)] if key_dim == value_dim else [(1, key_dim), (1, value_dim)]
            shapes = [(kv.num_layers, count, *block, dim) for count, dim in parts]
            if device.type == "cpu":
                return [lazy_zeros(shape, dtype) for shape in shapes]
            if on_host:  # a GPU copies pinned memory at full speed
                return [torch.zeros(shape, dtype=dtype, pin_memory=num_blocks > 0) for shape in shapes]
            return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

        self.device_pools = make_pools(num_blocks, on_host=False)
        self.host_pools = make_pools(num_host_blocks, on_host=True)
        by_layer = zip(*self.device_pools, strict=True)
        self.layers = [LayerKV(parts[0][0], parts[-1][-1]) for parts in by_layer]

    @property
    def num_bytes(self) -> int:
        """Of the pool on the device, with its null block."""
        return sum(pool.nbytes for pool in self.device_pools)

    def apply(self, ops: Sequence[KVOp], backend: AttentionBackend) -> None:
        """Apply block operations in order, copies by the backend. Raises RuntimeError for any other operation."""
        for _, run in groupby(ops, key=type):
            same = list(run)
            if copies := [(op.src, op.dst) for op in same if isinstance(op, BlockCopy)]:
                for pool in self.device_pools:
                    backend.copy_blocks(pool, copies)
            else:
                for op in same:
                    self._swap(op)

    def _swap(self, op: KVOp) -> None:
        for device, host in zip(self.device_pools, self.host_pools, strict=True):
            if isinstance(op, SwapOut):
                host[:, :, op.host_block] = device[:, :, op.block].to("cpu")
            elif isinstance(op, SwapIn):
                device[:, :, op.block] = host[:, :, op.host_block].to(device.device)
            else:
                raise RuntimeError(f"a pool of blocks cannot do {op}")


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on the CPU, by numpy's calloc: each page takes memory only when it is first written."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
