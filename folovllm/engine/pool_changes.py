"""The changes in the pool of blocks from one step to the next.

They are a dict; a key without changes is left out::

    tables, host   [request, blocks kept from the front, blocks after them] for each table that changed
    taken          blocks that left the free list
    freed          blocks that joined the end of the free list, in order
    cached         [block, the block before it or null] for each new or changed entry of the prefix cache
    uncached       blocks that left the prefix cache
    evicted        cached blocks that were allocated again, which overwrites their tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from folovllm.kv_cache.interface import BlockSnapshot

Tables = Mapping[str, Sequence[int]]


class PoolRecorder:
    """The pool after the newest step. At first all blocks are free, in order, and nothing is cached."""

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
        """The changes that lead to `after`. place: the name of a request in them."""
        before, self._before = self._before, after
        taken, freed = free_list_changes(before.free, after.free)
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
    """[request, blocks kept, new tail] for each table that changed. A removed table keeps nothing."""
    changes = []
    for request_id in dict.fromkeys([*before, *after]):
        old, new = tuple(before.get(request_id, ())), tuple(after.get(request_id, ()))
        if old != new:
            kept = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            changes.append([place(request_id), kept, list(new[kept:])])
    return changes


def free_list_changes(before: Sequence[int], after: Sequence[int]) -> tuple[list[int], list[int]]:
    """Blocks that left the free list anywhere, and blocks that joined its end: in this order, `before` becomes `after`.

    The other blocks keep their order. A block that left and came back is in both lists.
    """
    taken, stayed = [], 0
    for block in before:
        if stayed < len(after) and after[stayed] == block:
            stayed += 1
        else:
            taken.append(block)
    return taken, list(after[stayed:])


def evicted_blocks(before: BlockSnapshot, after: BlockSnapshot) -> list[int]:
    """Cached blocks that were allocated again."""
    counts_before = before.evictions or (0,) * len(after.evictions)
    return [b for b, (old, new) in enumerate(zip(counts_before, after.evictions, strict=True)) if new > old]
