"""Reference answers to the exercises of M4. The tasks are in `exercise.py`; each answer names its place in folovllm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

# --- chunks: what a step computes -------------------------------------------------------------------------


def split_budget(
    running: Sequence[tuple[str, int]],
    waiting: Sequence[tuple[str, int]],
    budget: int,
    long_prefill_token_threshold: int = 0,
) -> list[tuple[str, int]]:
    """A sort keeps the order of equals (`_schedule_running` and `_num_new_tokens` in folovllm/scheduler/scheduler.py).

    The engine asks for blocks as well, and for a seat, before it admits anybody.
    """
    if budget < 1 or long_prefill_token_threshold < 0:
        raise ValueError(
            f"budget={budget}, long_prefill_token_threshold={long_prefill_token_threshold}: at least 1 and 0"
        )
    step = []
    for name, missing in [*sorted(running, key=lambda place: place[1] > 1), *waiting]:
        count = min(missing, budget, long_prefill_token_threshold or budget)
        if count:
            step.append((name, count))
            budget -= count
    return step


def chunk_mask(shares: Sequence[tuple[int, int]]) -> torch.Tensor:
    """One rectangle per request (`visible_tokens` in folovllm/attention/reference.py), corner to corner.

    No engine makes the whole of it: attention takes request by request, and what is False is never computed.
    """
    if not shares or any(start < 0 or count < 1 for start, count in shares):
        raise ValueError(f"shares={shares}: at least one, each with a start >= 0 and a count >= 1")
    rectangles = [
        torch.arange(start + count) <= torch.arange(start, start + count)[:, None]  # [count, start + count]
        for start, count in shares
    ]
    return torch.block_diag(*(rectangle.long() for rectangle in rectangles)).bool()


def rows_to_sample(shares: Sequence[tuple[int, int, int]]) -> list[int]:
    """`_schedule` in folovllm/scheduler/scheduler.py marks who has caught up; the runner takes the last row of each."""
    rows, end = [], 0
    for start, count, known in shares:
        if start < 0 or count < 1 or start + count > known:
            raise ValueError(f"start={start}, count={count}, known={known}")
        end += count
        if start + count == known:
            rows.append(end - 1)
    return rows


# --- prefixes: what need not be computed ------------------------------------------------------------------


def block_keys(
    token_ids: Sequence[int],
    block_size: int,
    hash_block: Callable[[bytes, tuple[int, ...], str], bytes],
    secret: bytes,
    cache_salt: str = "",
) -> list[bytes]:
    """A chain: each key goes into the next (`hash_block` in folovllm/kv_cache/prefix_cache.py is the engine's hash)."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: at least 1")
    keys: list[bytes] = []
    for block in full_blocks(token_ids, block_size):
        keys.append(hash_block(keys[-1] if keys else secret, block, cache_salt))
    return keys


def full_blocks(token_ids: Sequence[int], block_size: int) -> Iterator[tuple[int, ...]]:
    """The tokens of each full block."""
    for end in range(block_size, len(token_ids) + 1, block_size):
        yield tuple(token_ids[end - block_size : end])


def reusable_tokens(num_tokens: int, block_size: int, in_cache: Sequence[bool]) -> int:
    """`_hits` in folovllm/kv_cache/block_manager.py looks at no more than (num_tokens - 1) // block_size blocks."""
    if min(num_tokens, block_size) < 1 or len(in_cache) != num_tokens // block_size:
        raise ValueError(f"num_tokens={num_tokens}, block_size={block_size}, in_cache has {len(in_cache)} entries")
    found = [*in_cache, False].index(False)
    return min(found, (num_tokens - 1) // block_size) * block_size


def eviction_order(num_blocks: int, events: Sequence[tuple[str, Sequence[int]]]) -> list[int]:
    """A dictionary is a line that can be left from anywhere (folovllm/kv_cache/block_pool.py: `BlockPool`)."""
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks}: at least 1")
    line = dict.fromkeys(range(1, num_blocks + 1))
    holders: Counter[int] = Counter()
    for what, blocks in events:
        for block in blocks if what == "hold" else reversed(blocks):
            if not 1 <= block <= num_blocks or (what == "release" and not holders[block]):
                raise ValueError(f"{what} of block {block}, of {num_blocks}, which {holders[block]} hold")
            if what == "hold":
                holders[block] += 1
                line.pop(block, None)
            else:
                holders[block] -= 1
                if not holders[block]:
                    line[block] = None
    return list(line)


class PrefixIndex:
    """Beginnings are numbered: one is the beginning before it and the tokens of a block.

    Nothing can collide, since tokens are compared. But the numbers of beginnings that are long gone stay. The engine's
    own (folovllm/kv_cache/prefix_cache.py: `PrefixCache`) keeps entries with a key that is a hash, compares tokens, and
    lets go of all of it when a block is evicted. It enters blocks before they are written, too, for those who come
    along in the same step.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: at least 1")
        self.block_size = block_size
        self.numbers: dict[tuple[int, tuple[int, ...], str], int] = {}  # (beginning before, tokens, salt) -> its number
        self.block_of: dict[int, int] = {}  # beginning -> block
        self.beginning_of: dict[int, int] = {}  # and back

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int], cache_salt: str = "") -> None:
        """Who is there first stays."""
        if len(blocks) > len(token_ids) // self.block_size:
            raise ValueError(f"{len(blocks)} blocks for {len(token_ids)} tokens in blocks of {self.block_size}")
        beginning = 0
        for tokens, block in zip(full_blocks(token_ids, self.block_size), blocks, strict=False):
            beginning = self.numbers.setdefault((beginning, tokens, cache_salt), len(self.numbers) + 1)
            if beginning not in self.block_of:
                self.block_of[beginning] = block
                self.beginning_of[block] = beginning

    def find(self, token_ids: Sequence[int], cache_salt: str = "") -> list[int]:
        """Down the chain until it breaks."""
        found: list[int] = []
        beginning = 0
        for tokens in full_blocks(token_ids, self.block_size):
            beginning = self.numbers.get((beginning, tokens, cache_salt), -1)
            if beginning not in self.block_of:
                break
            found.append(self.block_of[beginning])
        return found

    def evict(self, block: int) -> None:
        """Only what stands on this very block goes: another copy of the same beginning may be the one that is found."""
        beginning = self.beginning_of.pop(block, None)
        if beginning is not None:
            del self.block_of[beginning]

    def __len__(self) -> int:
        return len(self.block_of)
