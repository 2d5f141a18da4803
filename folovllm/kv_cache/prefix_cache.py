"""Which block holds which tokens, so that no prompt prefix is computed twice (vLLM: `vllm/v1/core/kv_cache_utils.py`).

K/V of a token depends on all tokens before it, so a block is named by its own tokens *and* by the block before it:

    key(block i) = hash(key(block i - 1), tokens of block i, cache_salt)        key(block -1) = a secret of this process

    [ You are a | helpful as | sistant. H ] ow ...     full blocks have keys, the rest of a prompt has none
        key 0  ->   key 1   ->   key 2

Equal keys mean equal prefixes only if nobody can find a collision, so a hit compares tokens, salt and the block before,
too. An entry goes through up to three states, and a request may use it from the second one on:

    promised   no block yet: a running request will compute these tokens in a later step
    pending    a block, which the coming forward writes: all layers store K/V before anybody attends
    written    a block, written

Invariants:
  1. An entry with a block is found by it, and the other way round. A block has one entry at most.
  2. Promised and pending entries have a writer, which runs. When it leaves, they go.
  3. An entry's parent is an entry, not a key: what stood on a block that was evicted is never found again.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from folovllm.request import Request

HashBlock = Callable[[bytes, Sequence[int], str], bytes]


def hash_block(parent: bytes, tokens: Sequence[int], cache_salt: str) -> bytes:
    """The key of a block after the one with the key `parent`: 16 bytes."""
    return blake2b(parent + array("q", tokens).tobytes() + cache_salt.encode(), digest_size=16).digest()


@dataclass(eq=False)  # an entry is itself: another one of the same tokens stands on another block
class CachedBlock:
    """One full block of tokens."""

    key: bytes
    parent: CachedBlock | None
    tokens: tuple[int, ...]
    cache_salt: str
    writer: str | None  # a request; None once K/V is written
    block: int | None = None  # None while it is promised

    def holds(self, parent: CachedBlock | None, tokens: tuple[int, ...], cache_salt: str) -> bool:
        """Whether it is what a request is looking for, compared in full."""
        return self.parent is parent and self.tokens == tokens and self.cache_salt == cache_salt


class PrefixCache:
    """The index of blocks by key. It knows nothing of who holds a block: a block is in it until it is used anew.

    secret: what keys begin with; random if not given, so that nobody outside can aim at a collision. hash_block: for
    tests, which bring one that collides.
    """

    def __init__(self, block_size: int, secret: bytes | None = None, hash_block: HashBlock = hash_block) -> None:
        self.block_size = block_size
        self.secret = secrets.token_bytes(16) if secret is None else secret
        self.hash_block = hash_block
        self._entries: dict[bytes, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        self._unwritten: dict[str, list[CachedBlock]] = {}  # by writer
        self._has_promised: set[str] = set()  # requests: known tokens are promised once
        self._keys: dict[str, list[bytes]] = {}  # by request; worked out once

    def __len__(self) -> int:
        return len(self._by_block)

    def find(self, request: Request, num_blocks: int) -> list[CachedBlock]:
        """The longest chain of entries for the request's first `num_blocks` blocks, promised ones included."""
        found: list[CachedBlock] = []
        for key, tokens in self._chain(request, 0, num_blocks):
            entry = self._entries.get(key)
            if entry is None or not entry.holds(found[-1] if found else None, tokens, request.cache_salt):
                break
            found.append(entry)
        return found

    def extend(self, request: Request, chain: list[CachedBlock], blocks: Sequence[int], num_blocks: int) -> None:
        """The request's first `num_blocks` blocks will be full after the coming forward: enter those that are new.

        chain: the request's entries so far, which grows. Where another block stands for the same tokens, that one
        stays in the index. All further full blocks of the request's known tokens are promised.
        """
        while chain and self._entries.get(chain[-1].key) is not chain[-1]:
            chain.pop()  # evicted: it was another request's, and this one has a block of its own to put in its place
        request_id, parent = request.request_id, chain[-1] if chain else None
        num_known = num_blocks if request_id in self._has_promised else request.num_tokens // self.block_size
        if num_known > num_blocks:
            self._has_promised.add(request_id)
        for index, (key, tokens) in enumerate(self._chain(request, len(chain), num_known), len(chain)):
            entry = self._entries.get(key)
            if entry is None or not entry.holds(parent, tokens, request.cache_salt):
                if entry is not None:
                    self._drop(entry)
                entry = self._entries[key] = CachedBlock(key, parent, tokens, request.cache_salt, request_id)
                self._unwritten.setdefault(request_id, []).append(entry)
            if index < num_blocks:
                if entry.block is None:
                    if entry.writer != request_id:  # promised by another, and this one is there first
                        entry.writer = request_id
                        self._unwritten.setdefault(request_id, []).append(entry)
                    entry.block = blocks[index]
                    self._by_block[blocks[index]] = entry
                chain.append(entry)
            parent = entry

    def commit(self, request_id: str) -> None:
        """The forward has written what was pending for this request."""
        unwritten = self._unwritten.pop(request_id, [])
        promised = []
        for entry in unwritten:
            if entry.writer == request_id and entry.block is None:
                promised.append(entry)
            elif entry.writer == request_id:
                entry.writer = None
        if promised:
            self._unwritten[request_id] = promised

    def forget(self, request_id: str) -> None:
        """The request leaves. What it has not written is not in the cache."""
        self._keys.pop(request_id, None)
        self._has_promised.discard(request_id)
        for entry in self._unwritten.pop(request_id, []):
            if entry.writer == request_id:
                self._drop(entry)

    def evict(self, block: int) -> None:
        """The block is given to somebody: what it held is lost."""
        entry = self._by_block.get(block)
        if entry is not None:
            self._drop(entry)

    def clear(self) -> None:
        """Forget everything."""
        for entry in list(self._entries.values()):
            self._drop(entry)
        self._unwritten.clear()

    def parents(self) -> dict[int, int | None]:
        """Blocks in the cache -> the block before each, None for a first one."""
        found: dict[int, int | None] = {}
        for block, entry in self._by_block.items():
            before = None if entry.parent is None else entry.parent.block
            found[block] = before if before is not None and self._by_block.get(before) is entry.parent else None
        return found

    def check(self) -> None:
        """Raise RuntimeError unless the invariants hold. For tests."""
        with_block = {e.block: e for e in self._entries.values() if e.block is not None}
        if with_block != self._by_block or any(self._entries[e.key] is not e for e in self._by_block.values()):
            raise RuntimeError(f"entries by key and by block differ: {self._entries} and {self._by_block}")
        unwritten = {id(e) for entries in self._unwritten.values() for e in entries}
        for entry in self._entries.values():
            if entry.writer is not None and id(entry) not in unwritten:
                raise RuntimeError(f"{entry} has a writer and is not among its unwritten entries")
            if entry.writer is None and entry.block is None:
                raise RuntimeError(f"{entry} has neither a block nor a writer")

    def _chain(self, request: Request, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Keys and tokens of the request's blocks start .. end - 1, all of which it knows in full."""
        keys, size = self._keys.setdefault(request.request_id, []), self.block_size
        for index in range(min(start, len(keys)), end):
            tokens = tuple(request.tokens(index * size, (index + 1) * size))
            if index == len(keys):
                keys.append(self.hash_block(keys[-1] if keys else self.secret, tokens, request.cache_salt))
            if index >= start:
                yield keys[index], tokens

    def _drop(self, entry: CachedBlock) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        if entry.block is not None and self._by_block.get(entry.block) is entry:
            del self._by_block[entry.block]
        entry.parent, entry.writer = None, None  # nothing is found below it any more; let go of what was above
