"""What attention must know of a ragged batch (vLLM: `vllm/v1/attention/backends/utils.py: CommonAttentionMetadata`).

The tokens of all requests stand one behind the other, without padding, in one axis of length T:

    requests          a: 3 new tokens of a prompt | b: 1 | c: 1        T = 5, R = 3
    query_start_loc   0                           3      4     5       where each request's tokens begin, and the end
    seq_lens          3                             17     6           K/V it may see, these tokens included
    slot_mapping      one slot per token: block * block_size + offset, where its K/V is written
    block_table       one row per request: where all of its K/V is, block by block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from folovllm.attention.prefix_groups import PrefixGroup, prefix_groups


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
    def groups(self) -> list[PrefixGroup]:
        """Requests that share the first part of their K/V. Worked out once per step, for all layers."""
        return prefix_groups(self.tables, self.query_lens, self.kv_lens, self.block_size)

    @cached_property
    def places(self) -> KVPlaces:
        """Where every request's K/V can be read in one piece. Worked out once per step, for all layers."""
        return self.find_places([0] * len(self.tables))

    @cached_property
    def places_after_groups(self) -> KVPlaces:
        """The same for what each request has beyond the prefix of its group; for decodes in groups see `tails`."""
        skipped: list[int | None] = [0] * len(self.tables)
        for group in self.groups:
            for index in group.requests:
                skipped[index] = group.num_blocks if self.query_lens[index] > 1 else None
        return self.find_places(skipped)

    @cached_property
    def tails(self) -> Tails | None:
        """What the decodes in groups have beyond their prefix, padded to one length; None if there are none."""
        members = [(i, g.num_blocks) for g in self.groups for i in g.requests if self.query_lens[i] == 1]
        if not members:
            return None
        size, device = self.block_size, self.slot_mapping.device
        lengths = [self.kv_lens[index] - skip * size for index, skip in members]
        width = -(-max(lengths) // size)
        blocks = torch.zeros(len(members), width, dtype=torch.int64)  # [M, B]; what is not filled is the null block
        for row, (index, skip) in enumerate(members):
            tail = self.tables[index][skip : -(-self.kv_lens[index] // size)]
            blocks[row, : len(tail)] = torch.tensor(tail)
        hidden = torch.arange(width * size) >= torch.tensor(lengths)[:, None]  # [M, S]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]  # [M, 1, 1, S]
        rows = torch.tensor([self.query_starts[index] for index, _ in members], device=device)
        empty = hidden.flatten().nonzero()[:, 0]
        return Tails(rows, blocks.flatten().to(device), empty.to(device), mask.to(device))

    @cached_property
    def group_rows(self) -> list[Tensor]:
        """Where the queries of each group's requests stand: [N]."""
        starts, lengths = self.query_starts, self.query_lens
        device = self.slot_mapping.device
        return [
            torch.cat([torch.arange(starts[i], starts[i] + lengths[i], device=device) for i in group.requests])
            for group in self.groups
        ]

    @cached_property
    def query_starts(self) -> list[int]:
        """The first row of every request."""
        return [end - length for end, length in zip(accumulate(self.query_lens), self.query_lens, strict=True)]

    def find_places(self, skipped: Sequence[int | None]) -> KVPlaces:
        """Ranges of slots for every request's K/V but that of its first `skipped` blocks; None: it needs none."""
        size = self.block_size
        scattered: list[int] = []
        in_pool, slots = [], []
        for full_table, kv_len, skip in zip(self.tables, self.kv_lens, skipped, strict=True):
            if skip is None:
                in_pool.append(True)
                slots.append(slice(0, 0))
                continue
            length = kv_len - skip * size
            table = full_table[skip : -(-kv_len // size)]
            neighbours = table == tuple(range(table[0], table[0] + len(table)))
            start = (table[0] if neighbours else len(scattered)) * size
            in_pool.append(neighbours)
            slots.append(slice(start, start + length))
            if not neighbours:
                scattered += table
        blocks = torch.tensor(scattered, device=self.slot_mapping.device) if scattered else None  # [blocks]
        return KVPlaces(in_pool, slots, blocks)


@dataclass(frozen=True)
class Tails:
    """K/V of M decodes that is theirs alone, as tables of one width.

    rows: [M], where their queries stand. blocks: [M * B], the null block where one has fewer. empty: those of the M * S
    slots without K/V of the request, where somebody else's may be, even NaN. mask: [M, 1, 1, S], -inf there, else 0.
    """

    rows: Tensor
    blocks: Tensor
    empty: Tensor
    mask: Tensor


@dataclass(frozen=True)
class KVPlaces:
    """Per request a range of slots that holds its K/V in order.

    in_pool: whether that range is in the pool itself, because the request's blocks are neighbours there; else it is in
    the copy that `scattered_blocks` [blocks] says how to make, block by block.
    """

    in_pool: list[bool]
    slots: list[slice]
    scattered_blocks: Tensor | None
