"""The layout of a ragged batch (vLLM: `vllm/v1/attention/backends/utils.py: CommonAttentionMetadata`).

The tokens of all requests are concatenated, without padding, into one axis of length T:

    requests          a: 3 new tokens of a prompt | b: 1 | c: 1        T = 5, R = 3
    query_start_loc   0                           3      4     5       where each request's tokens begin, and the end
    seq_lens          3                           17     6             tokens with K/V, the new ones included
    slot_mapping      one slot per token: block * block_size + offset, where its K/V is written
    block_table       one row per request: the blocks of all its K/V, in order
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class AttentionMetadata:
    """The layout of one step: R requests with T tokens.

    Padding comes last: requests of length 0, and tokens whose slots are in the null block.
    """

    query_start_loc: Tensor  # [R + 1] int32
    seq_lens: Tensor  # [R] int32
    slot_mapping: Tensor  # [T] int64
    block_table: Tensor  # [R, B] int32, rows padded with the null block
    block_size: int
    # The same on the host, without padding: reading it does not wait for the device.
    query_lens: list[int]  # new tokens of each request
    kv_lens: list[int]  # tokens with K/V of each request, the new ones included
    tables: list[tuple[int, ...]]  # blocks of each request

    @cached_property
    def num_tokens(self) -> int:
        """T without padding."""
        return sum(self.query_lens)

    @cached_property
    def only_decodes(self) -> bool:
        return max(self.query_lens) == 1
