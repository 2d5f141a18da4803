"""Physical blocks: how many hold on to each, and which are free (vLLM: `vllm/v1/core/block_pool.py`).

A block is room for `block_size` tokens of K/V in every layer. Here it is a number. Block 0 is the null block: nobody is
given it, so that whatever must point somewhere (padding) can point at it and do no harm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 to `num_blocks`, with reference counts and a free list.

    The free list is a line: blocks are taken from its front and come back at its end, so what has been free longest
    goes first. A free block can be taken from the middle, too (`touch`), in O(1).

    Invariants: a block is in the free list exactly if its reference count is 0, and free + held == num_blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} is not valid; allowed: an integer >= 0")
        self.num_blocks = num_blocks
        self.ref_cnt = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds, each counted once."""
        return self.num_blocks - len(self._free)

    def get_new_blocks(self, count: int) -> list[int]:
        """Take blocks from the front of the free list, held once each. Raises RuntimeError if there are fewer."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks were asked for and {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_cnt[block] = 1
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more. One that was free leaves the free list, wherever it stands."""
        for block in blocks:
            if self.ref_cnt[block] == 0:
                del self._free[block]
            self.ref_cnt[block] += 1

    def free_blocks(self, blocks: Iterable[int]) -> list[int]:
        """Let go of blocks, once each; those that are free now, which join the free list in the order given."""
        freed = []
        for block in blocks:
            if self.ref_cnt[block] <= 0:
                raise RuntimeError(f"block {block} is released and nobody holds it")
            self.ref_cnt[block] -= 1
            if self.ref_cnt[block] == 0:
                self._free[block] = None
                freed.append(block)
        return freed

    def free_list(self) -> list[int]:
        """The free list, front first."""
        return list(self._free)
