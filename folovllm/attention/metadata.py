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

from torch import Tensor


@dataclass
class AttentionMetadata:
    """One step's requests, R of them with T tokens.

    Rows and tokens beyond those of requests are padding: they have length 0 and slots of the null block.
    """

    query_start_loc: Tensor  # [R + 1] int32
    seq_lens: Tensor  # [R] int32
    slot_mapping: Tensor  # [T] int64
    block_table: Tensor  # [R, B] int32, rows padded with the null block
    block_size: int
    # The same on the host, without padding, so that reading it does not wait for the device.
    query_lens: list[int]  # new tokens of each request
    kv_lens: list[int]  # K/V that its last new token sees, itself included
    tables: list[tuple[int, ...]]  # its blocks

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of requests: T without padding."""
        return sum(self.query_lens)

    @cached_property
    def only_decodes(self) -> bool:
        """Whether no request has more than one new token."""
        return max(self.query_lens) == 1
