"""Which requests of a step read the same blocks first, so that a backend may read them once (see `shared_prefix`)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

MIN_SHARED_TOKENS = 64  # below that, two products and their sum take longer than reading the prefix again


@dataclass(frozen=True)
class PrefixGroup:
    """Requests of a step, by index, whose first `num_blocks` blocks are the same and hold no new token of theirs."""

    requests: tuple[int, ...]
    num_blocks: int


def prefix_groups(
    tables: list[tuple[int, ...]], query_lens: list[int], kv_lens: list[int], block_size: int
) -> list[PrefixGroup]:
    """Groups of two or more that share at least MIN_SHARED_TOKENS tokens; each request is in one at most."""
    by_first: dict[int, list[int]] = defaultdict(list)
    for index, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        if kv_len - query_len >= MIN_SHARED_TOKENS:
            by_first[tables[index][0]].append(index)
    groups = []
    for first, *others in by_first.values():
        shared = [(index, common_blocks(tables[first], tables[index])) for index in others]
        shared = [(index, count) for index, count in shared if count * block_size >= MIN_SHARED_TOKENS]
        members = (first, *(index for index, _ in shared))
        old = min((kv_lens[i] - query_lens[i]) // block_size for i in members)
        num_blocks = min([old, *(count for _, count in shared)])
        if len(members) > 1 and num_blocks * block_size >= MIN_SHARED_TOKENS:
            groups.append(PrefixGroup(members, num_blocks))
    return groups


def common_blocks(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first entries two tables have in common."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
