"""Exercises of M3: what blocks waste, where a token's K/V stands, who owns which block, and who gives way (chapter 4).

Write your answers in place of the lines that raise NotImplementedError, in any order, and run `folovllm grade m3`.
Each docstring says all there is to know; the README has a folded hint for each. Helper functions of your own are
welcome. The last checks of `BlockManager` put your class into the real engine, in place of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# --- what blocks waste ------------------------------------------------------------------------------------


def blocks_and_waste(num_tokens: int, block_size: int) -> tuple[int, float]:
    """How many blocks a sequence takes, and the share of their slots that stays empty.

    num_tokens: tokens with K/V. block_size: slots of a block, each for the K/V of one token. A sequence takes as few
    blocks as can hold it, and fills them one after the other.

    Examples: blocks_and_waste(100, 16) is (7, 0.107...): 7 * 16 = 112 slots, of which 12 are empty.
        blocks_and_waste(0, 16) is (0, 0.0): no blocks, and nothing in them is wasted.

    Raises ValueError for num_tokens < 0 and for block_size < 1.
    """
    raise NotImplementedError("blocks_and_waste")


def blocks_of_samples(prompt_len: int, output_len: int, n: int, block_size: int) -> tuple[int, int]:
    """Blocks that n samples of one prompt hold: when they share what they can, and when each has a copy of its own.

    Every sample has K/V of the prompt's tokens and of `output_len` tokens of its own, behind each other. The first
    sample computes the prompt. The others are forks of its first prompt_len - 1 tokens: each computes the last prompt
    token itself, since the logits that it samples from belong to that token. So they name the same blocks for as long
    as they write nothing into them. A block into which a sample has written a token, or had it copied because others
    were reading it, is its own.

    Returns (blocks held by all of them together with sharing, each physical block counted once; blocks without).

    Examples, with blocks of 4:
        blocks_of_samples(10, 3, 2, 4) is (6, 8). 13 tokens take 4 blocks. Tokens 0 to 8 are shared: blocks 0 and 1 stay
            so, and into block 2, which holds token 8, each sample writes token 9. 2 + 2 * 2 = 6 against 2 * 4 = 8.
        blocks_of_samples(9, 0, 3, 4) is (5, 9): tokens 0 to 7 fill the two blocks that are shared, and each sample
            writes token 8 into a third of its own.

    Raises ValueError for prompt_len, n or block_size below 1 and for output_len < 0.
    """
    raise NotImplementedError("blocks_of_samples")


# --- where a token's K/V stands ---------------------------------------------------------------------------


def slot_mapping(block_table: Sequence[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """The slots of the pool into which a step writes the K/V of a sequence's next tokens.

    block_table: the sequence's blocks, in the order of its tokens, which need not be theirs in the pool. start: the
    first token's position in the sequence; `num_tokens` tokens from there are written. Slots are counted over the whole
    pool: block b has the slots b * block_size to b * block_size + block_size - 1.

    Example: slot_mapping([7, 2, 9], start=3, num_tokens=3, block_size=4) is [31, 8, 9]: position 3 is the last slot of
        block 7, positions 4 and 5 are the first two of block 2.

    No tokens are no slots. Raises ValueError for start or num_tokens below 0, for block_size < 1, and for a token that
    the table has no block for: an operating system would call that a page fault.
    """
    raise NotImplementedError("slot_mapping")


# --- who owns which block ---------------------------------------------------------------------------------


class BlockManager:
    """Books of a pool of blocks that sequences share: who holds which block, and which are free. No K/V is in it.

    Blocks have the numbers 1 to num_blocks. There is a block 0, too, which is never given to anybody: an engine lets
    padding point there.

    Every sequence has an id, a length (its tokens with K/V) and a table: the blocks that hold these tokens, in order.
    Token i stands in block table[i // block_size], at slot i % block_size. A table has exactly as many blocks as its
    tokens need. A block may stand in several tables; its reference count says in how many, and it is free when that is
    0. A full pool is nothing unusual: whoever asks is told so, and the engine decides who has to give way.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """All blocks are free. Raises ValueError for num_blocks or block_size below 1."""
        raise NotImplementedError("BlockManager")

    def allocate(self, seq_id: str, num_tokens: int) -> bool:
        """A table for a new sequence of `num_tokens` tokens, in free blocks of its own.

        All or nothing: False, with nothing changed, if fewer blocks are free than it needs; else True.
        Raises ValueError for an id that has a table already, and for num_tokens < 1.
        """
        raise NotImplementedError("BlockManager")

    def append(self, seq_id: str, num_tokens: int) -> list[tuple[int, int]] | None:
        """Room for the next `num_tokens` tokens of a sequence, whose K/V is written after this call.

        They go into the last block as far as it has empty slots, and then into free blocks. If the first of them goes
        into a block that other tables name as well, writing there would change what the others read. So the sequence
        gets a free block in its place, and the engine copies the K/V before anything is written (copy-on-write). The
        others keep the old one.

        Returns the copies, as (from block, to block): [] or a list of one pair.
        All or nothing: None, with nothing changed, if fewer blocks are free than that takes, the copy included.
        Raises KeyError for an id without a table and ValueError for num_tokens < 1.
        """
        raise NotImplementedError("BlockManager")

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> None:
        """A new sequence with the parent's first `num_tokens` tokens. It names the same blocks, and takes no free one.

        That includes a last block that the child uses only a part of, and which the parent may have more tokens in.
        Raises KeyError for a parent without a table, ValueError for a child that has one, for num_tokens < 1 and for
        more tokens than the parent has.
        """
        raise NotImplementedError("BlockManager")

    def free(self, seq_id: str) -> None:
        """The sequence is gone. Of its blocks, those that no table names any more are free; the others stay.

        Raises KeyError for an id without a table. Afterwards the id may be used again.
        """
        raise NotImplementedError("BlockManager")

    def table(self, seq_id: str) -> list[int]:
        """The sequence's blocks, in the order of its tokens; a list of the caller's own.

        Raises KeyError for an id without a table.
        """
        raise NotImplementedError("BlockManager")

    def ref_count(self, block: int) -> int:
        """In how many tables the block stands; 0 if it is free."""
        raise NotImplementedError("BlockManager")

    def num_free(self) -> int:
        """How many blocks are free."""
        raise NotImplementedError("BlockManager")


# --- who gives way ----------------------------------------------------------------------------------------


def give_way(
    request_id: str,
    needed: int,
    running: Sequence[tuple[str, int]],
    tables: Mapping[str, Sequence[int]],
    num_free: int,
) -> list[str]:
    """Who loses its blocks, and in which order, so that a running request can go on.

    request_id: who needs blocks. It is in `running`.
    needed: free blocks that it needs.
    running: (id, priority) of all that run, in the order in which they were admitted. As in vLLM, a lower priority
        value is more urgent. Where nobody has a priority, all values are 0.
    tables: the blocks of each running request. No request that is not running has any.
    num_free: blocks that are free now.

    While fewer than `needed` blocks are free, the least urgent request gives way; among equals, the last admitted: it
    has the least to lose. All blocks in its table are let go. One that a table of somebody who still runs names as well
    does not come free by that: it does when the last of them gives way.

    A request never makes a more urgent one give way. So if the least urgent is the one that asks, it gives way itself,
    and that ends it: it no longer needs any blocks.

    Returns the ids of those that give way, in that order; [] if enough blocks are free.

    Examples, with running [("a", 0), ("b", 0), ("c", 0)] and tables {"a": [1, 2], "b": [3, 4], "c": [2, 5]}:
        give_way("a", 1, running, tables, num_free=0) is ["c"]: 5 is free then; 2 is not, a names it.
        give_way("a", 2, running, tables, num_free=0) is ["c", "b"]
        give_way("b", 1, [("a", 5), ("b", 0), ("c", 0)], tables, num_free=0) is ["a"], whose block 1 comes free.
        give_way("c", 1, running, tables, num_free=0) is ["c"]

    Raises ValueError for a request_id that does not run and for needed < 1.
    """
    raise NotImplementedError("give_way")


# --- what it costs ----------------------------------------------------------------------------------------


def preemption_seconds(
    num_tokens: int,
    block_size: int,
    *,
    kv_bytes_per_token: int,
    num_weights: int,
    flops_per_second: float,
    copy_bytes_per_second: float,
    seconds_per_copy: float,
) -> tuple[float, float]:
    """What it costs to take K/V of `num_tokens` tokens away from a request and to have it back: by either way.

    By recompute: its blocks are let go at once, and later all its tokens are computed again in a prefill. That takes
        2 * num_weights FLOPs per token, at flops_per_second. (Attention comes on top, and is left out here.)
    By swap: every block of it is copied to the host, and later back. Blocks are copied whole, whatever is in them, and
        each copy takes seconds_per_copy on top of its bytes at copy_bytes_per_second.

    Returns (seconds by recompute, seconds by swap), both ways of a swap included.

    Example: with kv_bytes_per_token=100,000, num_weights=10**9, flops_per_second=10**12, copy_bytes_per_second=10**10
        and seconds_per_copy=10**-5, preemption_seconds(100, 16, ...) is (0.2, 0.00238): 7 blocks of 1.6 MB each take
        0.00016 + 0.00001 s to copy, twice.

    Raises ValueError for num_tokens, block_size, kv_bytes_per_token or num_weights below 1, for speeds <= 0 and for
    seconds_per_copy < 0.
    """
    raise NotImplementedError("preemption_seconds")
