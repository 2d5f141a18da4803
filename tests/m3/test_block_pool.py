"""The pool of blocks against a plain list of free blocks and a dict of counts, after every operation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from folovllm.kv_cache.block_pool import NULL_BLOCK, BlockPool


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(0, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.free = list(range(1, num_blocks + 1))
        self.counts = dict.fromkeys(self.free, 0)
        self.filled = dict.fromkeys(self.free, 0)

    @rule(count=st.integers(0, 13))
    def allocate(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(RuntimeError, match=f"{count} blocks were asked for and {len(self.free)} are free"):
                self.pool.get_new_blocks(count)
            return
        expected, self.free = self.free[:count], self.free[count:]
        assert self.pool.get_new_blocks(count) == expected
        self.counts |= dict.fromkeys(expected, 1)
        self.filled |= dict.fromkeys(expected, 0)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """Held blocks and free ones, these from wherever they stand in the line."""
        blocks = data.draw(st.lists(st.sampled_from(list(self.counts)), unique=True) if self.counts else st.just([]))
        self.pool.touch(blocks)
        for block in blocks:
            self.counts[block] += 1
        self.free = [block for block in self.free if block not in blocks]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = [block for block, count in self.counts.items() for _ in range(count)]
        blocks = data.draw(st.permutations(held))[: data.draw(st.integers(0, len(held)))]
        for block in blocks:
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free.append(block)
        self.pool.free_blocks(iter(blocks))

    @precondition(lambda self: any(self.counts.values()))
    @rule(data=st.data(), filled=st.integers(0, 4))
    def fill(self, data: st.DataObject, filled: int) -> None:
        block = data.draw(st.sampled_from([block for block, count in self.counts.items() if count]))
        self.pool.fill(block, filled)
        self.filled[block] = max(self.filled[block], filled)

    @rule(data=st.data())
    def release_what_nobody_holds(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([NULL_BLOCK, *self.free]))
        with pytest.raises(RuntimeError, match=f"block {block} is freed and has no reference"):
            self.pool.free_blocks([block])

    @invariant()
    def it_is_as_the_list_says(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.free_list() == self.free
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_held == sum(count > 0 for count in self.counts.values())
        assert self.pool.num_free + self.pool.num_held == self.pool.num_blocks == len(self.counts)
        assert self.pool.ref_cnt == [0, *self.counts.values()]
        assert self.pool.filled == [0, *self.filled.values()]
        assert self.pool.num_used_slots == sum(self.filled[block] for block, count in self.counts.items() if count)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)


def test_nobody_is_given_the_null_block() -> None:
    pool = BlockPool(5)
    assert NULL_BLOCK == 0 and sorted(pool.get_new_blocks(5)) == [1, 2, 3, 4, 5]


def test_what_has_been_free_longest_goes_first() -> None:
    pool = BlockPool(4)
    pool.get_new_blocks(4)
    pool.free_blocks([3, 1])
    pool.free_blocks([4])
    assert pool.get_new_blocks(3) == [3, 1, 4]


def test_a_shared_block_is_free_when_the_last_one_lets_go() -> None:
    pool = BlockPool(2)
    (block,) = pool.get_new_blocks(1)
    pool.touch([block])
    pool.free_blocks([block])
    assert pool.num_free == 1
    pool.free_blocks([block])
    assert pool.num_free == 2 and pool.free_list() == [2, block]


def test_a_free_block_leaves_the_middle_of_the_line_without_a_look_at_the_others() -> None:
    """O(1), counted: a line that is asked for one block in its middle must not be walked."""

    class Watched(int):
        looks = 0

        def __eq__(self, other: object) -> bool:
            Watched.looks += 1
            return int(self) == other

        __hash__ = int.__hash__

    pool = BlockPool(1000)
    pool._free = type(pool._free).fromkeys(Watched(block) for block in pool._free)
    Watched.looks = 0
    pool.touch([500])
    assert Watched.looks <= 2 and pool.free_list()[498:500] == [499, 501]


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=-1 is not valid; allowed: an integer >= 0"):
        BlockPool(-1)
