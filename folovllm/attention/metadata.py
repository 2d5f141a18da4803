"""What attention must know of a ragged batch (vLLM: `vllm/v1/attention/backends/utils.py: CommonAttentionMetadata`).

The tokens of all requests stand one behind the other, without padding, in one axis of length T:

    requests          a: 3 new tokens of a prompt | b: 1 | c: 1        T = 5, R = 3
    query_start_loc   0                           3      4     5       where each request's tokens begin, and the end
    seq_lens          3                             17     6           K/V it may see, these tokens included
    slot_mapping      one slot per token: block * block_size + offset, where its K/V is written
    block_table       one row per request: where all of its K/V is, block by block
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class AttentionMetadata:
    """One step's requests, R of them with T tokens.

    query_start_loc: [R + 1] int32. seq_lens: [R] int32. slot_mapping: [T] int64. block_table: [R, B] int32, rows padded
    with the null block. query_lens, kv_lens, tables: the same on the host, so that nobody has to wait for the device.
    Rows and tokens beyond those of requests are padding: they have length 0 and slots of the null block.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    block_size: int
    query_lens: list[int]
    kv_lens: list[int]
    tables: list[tuple[int, ...]]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of requests: T without padding."""
        return sum(self.query_lens)

    @cached_property
    def only_decodes(self) -> bool:
        """Whether no request has more than one new token."""
        return max(self.query_lens) == 1

    @cached_property
    def places(self) -> KVPlaces:
        """Where every request's K/V can be read in one piece. Worked out once per step, for all layers."""
        size = self.block_size
        scattered: list[int] = []
        in_pool, slots = [], []
        for table, length in zip(self.tables, self.kv_lens, strict=True):
            num_blocks = -(-length // size)
            first = table[0]
            neighbours = table[:num_blocks] == tuple(range(first, first + num_blocks))
            start = (first if neighbours else len(scattered)) * size
            in_pool.append(neighbours)
            slots.append(slice(start, start + length))
            if not neighbours:
                scattered += table[:num_blocks]
        blocks = torch.tensor(scattered, device=self.slot_mapping.device) if scattered else None  # [blocks]
        return KVPlaces(in_pool, slots, blocks)


@dataclass(frozen=True)
class KVPlaces:
    """Per request a range of slots that holds its K/V in order.

    in_pool: whether that range is in the pool itself, because the request's blocks are neighbours there; else it is in
    the copy that `scattered_blocks` [blocks] says how to make, block by block.
    """

    in_pool: list[bool]
    slots: list[slice]
    scattered_blocks: Tensor | None
