"""A step's requests as ragged tensors: one axis of T tokens, one of R requests (vLLM: `gpu_input_batch.py`).

The tensors are allocated once at the largest size, and each step writes a prefix of them. On a GPU this saves
allocations, and lengths can be rounded up to a few sizes, so that a CUDA graph could be replayed on the same memory.
Padding belongs to no request and writes to the null block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folovllm.attention.metadata import AttentionMetadata
from folovllm.kv_cache.block_pool import NULL_BLOCK
from folovllm.kv_cache.interface import BlockPlan
from folovllm.messages import ScheduledRequest


@dataclass
class ModelInput:
    """The inputs of a forward."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    sample_rows: Tensor  # [N], the rows to sample from
    metadata: AttentionMetadata
    padding_tokens: int


class Buffer:
    """A tensor on the device, and the host array that fills it. On a CPU they share memory."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.array: NDArray[np.int64] = self.host.numpy()
        self.device = self.host if device.type == "cpu" else torch.zeros(*shape, dtype=dtype, device=device)

    def send(self, length: int) -> Tensor:
        """Copy the first `length` entries to the device, and return them."""
        if self.device is not self.host:
            self.device[:length].copy_(self.host[:length], non_blocking=True)
        return self.device[:length]


class InputBatch:
    """Buffers for steps of at most `max_tokens` tokens of `max_requests` requests of `max_blocks` blocks each.

    sizes: token and request counts to round up to, in ascending order; () for no padding. A step larger than the last
    size is not padded.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        sizes: Sequence[int] = (),
    ) -> None:
        self.block_size = block_size
        self.sizes = tuple(sizes)
        tokens, requests = max(max_tokens, *self.sizes, 0), max(max_requests, *self.sizes, 0)
        self.token_ids = Buffer(tokens, dtype=torch.int64, device=device)
        self.positions = Buffer(tokens, dtype=torch.int64, device=device)
        self.slot_mapping = Buffer(tokens, dtype=torch.int64, device=device)
        self.query_start_loc = Buffer(requests + 1, dtype=torch.int32, device=device)
        self.seq_lens = Buffer(requests, dtype=torch.int32, device=device)
        self.block_table = Buffer(requests, max_blocks, dtype=torch.int32, device=device)
        self.sample_rows = Buffer(requests, dtype=torch.int64, device=device)

    def padded(self, count: int) -> int:
        """The smallest size >= `count`; `count` if there is none."""
        return next((size for size in self.sizes if size >= count), count)

    def fill(self, scheduled: Sequence[ScheduledRequest]) -> ModelInput:
        """Lay out a step: the requests' tokens, concatenated in the order given."""
        size = self.block_size
        start, num_samples = 0, 0
        tables: list[tuple[int, ...]] = []
        for row, share in enumerate(scheduled):
            if not isinstance(share.plan, BlockPlan):
                raise RuntimeError(f"request {share.request_id!r} has a plan without blocks")
            end, kv_len = start + share.num_tokens, share.start + share.num_tokens
            table = np.asarray(share.plan.block_table, dtype=np.int32)  # [blocks]
            positions = np.arange(share.start, kv_len)  # [L]
            self.token_ids.array[start:end] = share.token_ids
            self.positions.array[start:end] = positions
            self.slot_mapping.array[start:end] = table[positions // size].astype(np.int64) * size + positions % size
            self.query_start_loc.array[row + 1] = end
            self.seq_lens.array[row] = kv_len
            self.block_table.array[row, : len(table)] = table
            self.block_table.array[row, len(table) :] = NULL_BLOCK
            if share.samples:
                self.sample_rows.array[num_samples] = end - 1
                num_samples += 1
            tables.append(share.plan.block_table)
            start = end
        num_tokens, num_requests = self.padded(start), self.padded(len(scheduled))
        self.token_ids.array[start:num_tokens] = 0
        self.positions.array[start:num_tokens] = 0
        self.slot_mapping.array[start:num_tokens] = NULL_BLOCK * size
        self.query_start_loc.array[len(scheduled) + 1 : num_requests + 1] = start
        self.seq_lens.array[len(scheduled) : num_requests] = 0
        self.block_table.array[len(scheduled) : num_requests] = NULL_BLOCK
        metadata = AttentionMetadata(
            self.query_start_loc.send(num_requests + 1),
            self.seq_lens.send(num_requests),
            self.slot_mapping.send(num_tokens),
            self.block_table.send(num_requests),
            size,
            [share.num_tokens for share in scheduled],
            [share.start + share.num_tokens for share in scheduled],
            tables,
        )
        return ModelInput(
            self.token_ids.send(num_tokens),
            self.positions.send(num_tokens),
            self.sample_rows.send(num_samples),
            metadata,
            num_tokens - start,
        )
