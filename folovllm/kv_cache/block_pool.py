"""Physical blocks: how many hold each, which are free, and how full they are (vLLM: `vllm/v1/core/block_pool.py`).

A block has slots for the K/V of `block_size` tokens in every layer. Here it is a number. Block 0 is the null block: it
is never allocated, so that whatever has to point to some block (padding) can point to it and do no harm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from folovllm.checks import check_int

NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 to `num_blocks`, with reference counts and a free list.

    Blocks are taken from the front of the free list and come back at its end, so the block that has been free longest
    is taken first. A free block can also be taken from the middle (`touch`), in O(1).

    Invariants: a block is in the free list exactly if its reference count is 0, and free + held == num_blocks;
    num_used_slots == the sum of `filled` over held blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        check_int("num_blocks", num_blocks, 0)
        self.num_blocks = num_blocks
        self.ref_cnt = [0] * (num_blocks + 1)
        self.filled = [0] * (num_blocks + 1)  # slots written since the block was allocated; free blocks keep theirs
        self.num_used_slots = 0
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        """Blocks with reference count 0."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """All other blocks, each counted once."""
        return self.num_blocks - len(self._free)

    def get_new_blocks(self, count: int) -> list[int]:
        """Allocate blocks from the front of the free list, empty. Raises RuntimeError if there are fewer."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks were asked for and {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_cnt[block] = 1
            self.filled[block] = 0
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block. A free one leaves the free list, wherever it is."""
        for block in blocks:
            if self.ref_cnt[block] == 0:
                del self._free[block]
                self.num_used_slots += self.filled[block]
            self.ref_cnt[block] += 1

    def fill(self, block: int, filled: int) -> None:
        """The first `filled` slots of a held block are written."""
        new = max(0, filled - self.filled[block])
        self.filled[block] += new
        self.num_used_slots += new

    def free_blocks(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block. Those without any join the free list, in the order given."""
        for block in blocks:
            if self.ref_cnt[block] <= 0:
                raise RuntimeError(f"block {block} is freed and has no reference")
            self.ref_cnt[block] -= 1
            if self.ref_cnt[block] == 0:
                self._free[block] = None
                self.num_used_slots -= self.filled[block]

    def free_list(self) -> list[int]:
        """The free list, front first."""
        return list(self._free)
