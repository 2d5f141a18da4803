"""The tensors of paged K/V: a pool per layer on the device, one on the host to swap to, and the block operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.kv_cache.interface import BlockCopy, KVOp, SwapIn, SwapOut
from folovllm.models.paged_model import PagedModel


class KVStorage:
    """K/V of all layers in blocks. Block 0 is the null block: padding is written there and nobody reads it.

    Each pool is [layers, 2, blocks + 1, block_size, Hkv, D], zeroed so that what was never written is finite. On a CPU
    it takes memory as it is written, not before.
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
        shape, host_shape = (num_layers, 2, num_blocks + 1, *block), (num_layers, 2, num_host_blocks + 1, *block)
        if device.type == "cpu":
            self.device_pool, self.host_pool = lazy_zeros(shape, dtype), lazy_zeros(host_shape, dtype)
        else:
            self.device_pool = torch.zeros(shape, dtype=dtype, device=device)
            pin = num_host_blocks > 0  # pinned memory is what a GPU copies at full speed
            self.host_pool = torch.zeros(host_shape, dtype=dtype, pin_memory=pin)
        self.layers = [LayerKV(layer[0], layer[1]) for layer in self.device_pool]

    @classmethod
    def of_model(cls, model: PagedModel, num_blocks: int, num_host_blocks: int, block_size: int) -> KVStorage:
        """A pool for the model's layers."""
        shape = model.config
        blocks = (num_blocks, num_host_blocks, block_size)
        return cls(shape.num_layers, *blocks, shape.num_kv_heads, shape.head_dim, model.dtype, model.device)

    def apply(self, ops: Sequence[KVOp], backend: AttentionBackend) -> None:
        """Do block operations in order, copies by the backend. Raises RuntimeError for one that is not about blocks."""
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
    """As `torch.zeros` on the CPU, but the system gives each page when it is first written: numpy uses calloc."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
