"""Exercises of M4: prompts in chunks beside the decodes (chapter 6), and no prefix computed twice (chapter 7).

Write your answers in place of the lines that raise NotImplementedError, in any order, and run `folovllm grade m4`.
Each docstring says all there is to know; the README has a folded hint for each. Helper functions of your own are
welcome. The last checks of `PrefixIndex` put your class into the real engine, in place of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# --- chunks: what a step computes -------------------------------------------------------------------------


def split_budget(
    running: Sequence[tuple[str, int]],
    waiting: Sequence[tuple[str, int]],
    budget: int,
    long_prefill_token_threshold: int = 0,
) -> list[tuple[str, int]]:
    """Share the tokens of one step among the requests that have something to compute.

    running: (id, tokens it knows and has no K/V for) of those that run, in the order in which they were admitted. One
        that decodes lacks exactly 1, the token that it sampled last. One whose prompt is being computed in chunks lacks
        as many as are left of it. 0 is not possible.
    waiting: the same of those that wait, first in line first.
    budget: tokens that the step computes at most.
    long_prefill_token_threshold: if not 0, nobody gets more tokens than that in one step.

    First come the decodes: those of `running` that lack exactly 1. Then those of `running` that lack more, since they
    have begun. Then those that wait. Within each of the three groups they keep their order. Each in turn gets as much
    as it lacks, but no more than the budget has left and no more than `long_prefill_token_threshold`. A request
    that would get 0 tokens is not in the step.

    Returns (id, tokens) of all that take part, in that order.

    Examples, with running [("a", 1), ("b", 900), ("c", 1)] and waiting [("d", 5), ("e", 40)]:
        split_budget(running, waiting, 256) is [("a", 1), ("c", 1), ("b", 254)]
        split_budget(running, waiting, 256, 128) is [("a", 1), ("c", 1), ("b", 128), ("d", 5), ("e", 40)]
        split_budget(running, waiting, 150, 128) is [("a", 1), ("c", 1), ("b", 128), ("d", 5), ("e", 15)]

    Raises ValueError for budget < 1 and for long_prefill_token_threshold < 0.
    """
    raise NotImplementedError("split_budget")


def chunk_mask(shares: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which keys each token of a step may see, when the tokens of all its requests stand in one row.

    shares: (start, count) per request. The step computes `count` tokens of it, at the positions start, start + 1, ...
        K/V of its positions below `start` is there from earlier steps, or from the cache. A decode is (start, 1), a
        whole prompt (0, count), and a chunk in the middle of a prompt (start, count).

    Returns a bool tensor with a row per computed token and a column per key. Rows: the tokens of the first request in
    the order of their positions, then those of the second, and so on. Columns: all keys of the first request, from its
    position 0 to its newest token, then all of the second, and so on. True means "may look". A token sees itself and
    everything before it of its own request, whether computed in this step or long ago, and nothing of anybody else.

    Examples: chunk_mask([(2, 3)]), tokens 2 to 4 of a prompt:      chunk_mask([(3, 1), (0, 2)]), a decode and a prompt:
        T T T F F                                                       T T T T F F
        T T T T F                                                       F F F F T F
        T T T T T                                                       F F F F T T

    Raises ValueError for no shares, for start < 0 and for count < 1.
    """
    raise NotImplementedError("chunk_mask")


def rows_to_sample(shares: Sequence[tuple[int, int, int]]) -> list[int]:
    """From which rows of a step the next tokens are sampled.

    shares: (start, count, known) per request. The step computes `count` tokens of it from position `start` on. `known`
        tokens of it are known: its prompt, and what it has sampled so far. The tokens of all requests stand in one row,
        those of the first request first, as in `chunk_mask`.

    The logits of a token say what may follow it. They are of use only for the newest token that is known: what follows
    any other one is known already. So a request samples in the step that computes its last known token, and from that
    token's row; with a chunk that ends before it, it samples nothing.

    Returns the numbers of those rows, counted from 0 over all tokens of the step, in rising order.

    Example: rows_to_sample([(9, 1, 10), (0, 4, 6), (3, 2, 5)]) is [0, 6]. The first request decodes, in row 0. The
        second one computes 4 of 6 tokens in rows 1 to 4, and is not done. The third computes its last two in rows 5
        and 6.

    No shares have no rows. Raises ValueError for start < 0, for count < 1, and for tokens beyond those that are known.
    """
    raise NotImplementedError("rows_to_sample")


# --- prefixes: what need not be computed ------------------------------------------------------------------


def block_keys(
    token_ids: Sequence[int],
    block_size: int,
    hash_block: Callable[[bytes, tuple[int, ...], str], bytes],
    secret: bytes,
    cache_salt: str = "",
) -> list[bytes]:
    """The keys of a text's full blocks, by which their K/V can be found again.

    The K/V of a token depends on all tokens before it. So a block's key is made of its own tokens *and* of the key of
    the block before it: two blocks have the same key only if everything up to their ends is the same.

    token_ids: the text. block_size: tokens per block. Block i holds the tokens i * block_size to
        (i + 1) * block_size - 1. A block at the end that is not full has no key: it is still being written.
    hash_block: hash_block(key of the block before, the block's tokens as a tuple, cache_salt) is the block's key.
    secret: stands for the key before the first block, where there is none.
    cache_salt: goes into every key, so that only texts with the same salt share blocks.

    Returns the keys in the order of the blocks. hash_block is called once for each of them.

    Example: with block_size=2, block_keys([5, 6, 7, 8, 9], ...) is [k0, k1], with k0 = hash_block(secret, (5, 6), salt)
        and k1 = hash_block(k0, (7, 8), salt). Token 9 begins a block that is not full.

    Raises ValueError for block_size < 1.
    """
    raise NotImplementedError("block_keys")


def reusable_tokens(num_tokens: int, block_size: int, in_cache: Sequence[bool]) -> int:
    """How many of a new request's tokens need not be computed, because their K/V is in the cache.

    num_tokens: tokens of the request, at least 1.
    in_cache: for each of its full blocks, from the first one on, whether the cache has it.

    Only an unbroken beginning helps: tokens after the first block that is missing have to be computed in any case, and
    a block after it would be of no use to them. And at least one token is always left to compute, even if the cache has
    all: the request can only go on from the logits of its last token, and the cache keeps K/V, not logits. What is
    reused are whole blocks.

    Returns a number of tokens, a multiple of block_size below num_tokens.

    Examples, with blocks of 4:
        reusable_tokens(14, 4, [True, True, True]) is 12. The last two tokens are computed.
        reusable_tokens(14, 4, [True, False, True]) is 4
        reusable_tokens(12, 4, [True, True, True]) is 8: all is cached, and the last block is computed again for the
            logits of token 11.

    Raises ValueError for num_tokens or block_size below 1, and if in_cache has not one entry for each full block.
    """
    raise NotImplementedError("reusable_tokens")


def eviction_order(num_blocks: int, events: Sequence[tuple[str, Sequence[int]]]) -> list[int]:
    """The free blocks of a pool, in the order in which they will be given to others and lose what is cached in them.

    The pool has blocks 1 to num_blocks. At first all are free, and stand in line in that order.

    events: what happened, oldest first. Each is one of
        ("hold", blocks): a request has been admitted, with these blocks as its table, in the order of its tokens. Some
            of them may be free ones from anywhere in the line, others may be held by requests that run already.
        ("release", blocks): a request with this table is done, and holds its blocks no longer.

    A block is free when nobody holds it. One that is held leaves the line at once, wherever it stood. It comes back, at
    the end of the line, when the last of its holders is done: so the block at the front is the one that has been of no
    use for longest (least recently used). Of the blocks that one request sets free, the last one of its table joins the
    line first: a tail is of use only to who has the whole text before it, so it should be lost before the head is.

    Returns the numbers of the free blocks, the next to be taken first.

    Examples, with 5 blocks:
        eviction_order(5, []) is [1, 2, 3, 4, 5]
        eviction_order(5, [("hold", [1, 2]), ("release", [1, 2])]) is [3, 4, 5, 2, 1]
        eviction_order(5, [("hold", [1, 2]), ("hold", [1, 3]), ("release", [1, 2])]) is [4, 5, 2]: 1 is held still.

    Raises ValueError for num_blocks < 1, for a block that the pool does not have, and for the release of a block that
    nobody holds.
    """
    raise NotImplementedError("eviction_order")


class PrefixIndex:
    """Which block has the K/V of which text. It knows nothing of who holds a block, and nothing of K/V itself.

    The engine tells it which blocks were written, asks it what a new prompt can start with, and tells it when a block
    is given to somebody else, so that what was in it is lost. All texts are token ids. Blocks are numbers.

    A block stands for a beginning: all tokens from the first one of the text to its own last one, and the salt. It may
    be found only for a text that begins with exactly these tokens, and has the same salt.
    """

    def __init__(self, block_size: int) -> None:
        """An empty index for blocks of `block_size` tokens. Raises ValueError for block_size < 1."""
        raise NotImplementedError("PrefixIndex")

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int], cache_salt: str = "") -> None:
        """The K/V of a text's first full blocks is written: block i of the text stands in blocks[i].

        token_ids: the text, which may have more tokens than `blocks` hold. Some of the blocks may be in the index
        already, for the same beginnings. Where another block stands for a beginning already, that one stays in the
        index, and the new one is not entered: it is a second copy.
        Raises ValueError if the text has fewer full blocks than `blocks` names.
        """
        raise NotImplementedError("PrefixIndex")

    def find(self, token_ids: Sequence[int], cache_salt: str = "") -> list[int]:
        """The blocks that a text with these tokens can start with, in order; [] for none.

        From the first full block of the text on, until one is not in the index. Which blocks those of the same text
        were once inserted together with makes no difference.
        """
        raise NotImplementedError("PrefixIndex")

    def evict(self, block: int) -> None:
        """The block is given to somebody else: it is not found any more, until it is inserted again.

        A block that is not in the index may be given away as well; then nothing changes.
        """
        raise NotImplementedError("PrefixIndex")

    def __len__(self) -> int:
        """How many blocks are in the index."""
        raise NotImplementedError("PrefixIndex")
