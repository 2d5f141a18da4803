"""What changed in the pool of blocks from one step to the next.

A change is a dict; what did not change is left out::

    tables, host   [request, blocks kept from the front, blocks after them] for each table that is another one now
    taken          blocks that left the line of free ones
    freed          blocks that joined its end, in order
    cached         [block, the block before it or null] for each entry of the prefix cache that is new or another
    uncached       blocks that are in the cache no more
    evicted        blocks that were given to somebody else while they were cached: what stood in them is lost
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from folovllm.kv_cache.interface import BlockSnapshot

Tables = Mapping[str, Sequence[int]]


class PoolRecorder:
    """The pool after the newest step. Before the first, all blocks are free, in order, and nothing is cached."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self._before = BlockSnapshot(
            block_size,
            {},
            {},
            (0,) * (num_blocks + 1),
            (0,) * (num_blocks + 1),
            num_blocks,
            tuple(range(1, num_blocks + 1)),
        )

    def observe(self, after: BlockSnapshot, place: Callable[[str], int]) -> dict[str, Any]:
        """The changes that lead to `after`. place: how a request is named."""
        before, self._before = self._before, after
        taken, freed = line_changes(before.free, after.free)
        made: dict[str, Any] = {
            "tables": table_changes(before.tables, after.tables, place),
            "host": table_changes(before.host_tables, after.host_tables, place),
            "taken": taken,
            "freed": freed,
            "cached": [[b, p] for b, p in after.cached.items() if b not in before.cached or before.cached[b] != p],
            "uncached": [block for block in before.cached if block not in after.cached],
            "evicted": evicted_blocks(before, after),
        }
        return {name: change for name, change in made.items() if change}


def table_changes(before: Tables, after: Tables, place: Callable[[str], int]) -> list[list[Any]]:
    """[request, blocks kept, new tail] for each table that changed; one that is gone keeps nothing."""
    changes = []
    for request_id in dict.fromkeys([*before, *after]):
        old, new = tuple(before.get(request_id, ())), tuple(after.get(request_id, ()))
        if old != new:
            kept = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            changes.append([place(request_id), kept, list(new[kept:])])
    return changes


def line_changes(before: Sequence[int], after: Sequence[int]) -> tuple[list[int], list[int]]:
    """Blocks that left a line, and those that joined its end, so that the one becomes the other.

    Who stays keeps the order, since blocks leave from anywhere and join at the end only. One that left and came back
    is in both.
    """
    taken, stayed = [], 0
    for block in before:
        if stayed < len(after) and after[stayed] == block:
            stayed += 1
        else:
            taken.append(block)
    return taken, list(after[stayed:])


def evicted_blocks(before: BlockSnapshot, after: BlockSnapshot) -> list[int]:
    """Blocks that were given to somebody else while tokens in them were cached, which are lost now."""
    counts_before = before.evictions or (0,) * len(after.evictions)
    return [b for b, (old, new) in enumerate(zip(counts_before, after.evictions, strict=True)) if new > old]
