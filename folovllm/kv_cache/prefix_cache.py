"""Which block holds which tokens, so that no prompt prefix is computed twice (vLLM: `vllm/v1/core/kv_cache_utils.py`).

K/V of a token depends on all tokens before it, so a block is named by its own tokens *and* by the block before it:

    key(block i) = hash(key(block i - 1), tokens of block i, cache_salt)        key(block -1) = a secret of this process

    [ You are a | helpful as | sistant. H ] ow ...     full blocks have keys, the rest of a prompt has none
        key 0  ->   key 1   ->   key 2

Equal keys mean equal prefixes only if there is no hash collision, so a hit also compares the tokens, the salt and the
block before. A block enters the cache in the step that fills it. Until the forward has run it is *pending*: requests of
the same step may hit it already, because every layer stores its K/V before attention reads it.

Invariants:
  1. A block has at most one entry, and an entry one block.
  2. A pending entry has a writer, a request of the current step. If the writer leaves the step, the entry is removed.
  3. An entry's parent is an entry, not a key: what followed a block that was evicted is never found again.
"""

from __future__ import annotations

import secrets
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from folovllm.request import Request

HashBlock = Callable[[bytes, Sequence[int], str], bytes]


def hash_block(parent: bytes, tokens: Sequence[int], cache_salt: str) -> bytes:
    """The key of a block after the one with the key `parent`: 16 bytes."""
    return blake2b(parent + array("q", tokens).tobytes() + cache_salt.encode(), digest_size=16).digest()


@dataclass(eq=False)  # compared by identity: two blocks may hold the same tokens
class CachedBlock:
    """One full block of tokens."""

    key: bytes
    parent: CachedBlock | None
    tokens: tuple[int, ...]
    cache_salt: str
    block: int

    def holds(self, parent: CachedBlock | None, tokens: tuple[int, ...], cache_salt: str) -> bool:
        """Whether it is what a request is looking for, compared in full."""
        return self.parent is parent and self.tokens == tokens and self.cache_salt == cache_salt


class PrefixCache:
    """The index of blocks by key. A block stays in it, also when it is free, until it is allocated anew.

    secret: what the first keys are hashed with; random if not given, so that no user can construct a collision.
    hash_block: for tests, which use one that collides.
    """

    def __init__(self, block_size: int, secret: bytes | None = None, hash_block: HashBlock = hash_block) -> None:
        self.block_size = block_size
        self.secret = secrets.token_bytes(16) if secret is None else secret
        self.hash_block = hash_block
        self.evictions: Counter[int] = Counter()  # by block: how often it was allocated anew while it was cached
        self._entries: dict[bytes, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        self._pending: dict[str, list[CachedBlock]] = {}  # by writer
        self._keys: dict[str, list[bytes]] = {}  # by request, so that each is hashed once

    def __len__(self) -> int:
        return len(self._by_block)

    def find(self, request: Request, num_blocks: int) -> list[CachedBlock]:
        """The longest chain of entries for the request's first `num_blocks` blocks."""
        found: list[CachedBlock] = []
        for key, tokens in self._chain(request, 0, num_blocks):
            entry = self._entries.get(key)
            if entry is None or not entry.holds(found[-1] if found else None, tokens, request.cache_salt):
                break
            found.append(entry)
        return found

    def extend(self, request: Request, chain: list[CachedBlock], blocks: Sequence[int], num_blocks: int) -> None:
        """The coming forward fills the request's first `num_blocks` blocks: enter those that are new.

        chain: the request's entries so far, which grows. If the same tokens are cached in another block, that block's
        entry stays.
        """
        while chain and self._entries.get(chain[-1].key) is not chain[-1]:
            chain.pop()  # an evicted block of another request: this one has computed the tokens in a block of its own
        for index, (key, tokens) in enumerate(self._chain(request, len(chain), num_blocks), len(chain)):
            entry, parent = self._entries.get(key), chain[-1] if chain else None
            if entry is None or not entry.holds(parent, tokens, request.cache_salt):
                if entry is not None:
                    self._drop(entry)
                entry = CachedBlock(key, parent, tokens, request.cache_salt, blocks[index])
                self._entries[key] = self._by_block[entry.block] = entry
                self._pending.setdefault(request.request_id, []).append(entry)
            chain.append(entry)

    def commit(self, request_id: str) -> None:
        """The forward has written the request's pending blocks."""
        self._pending.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """The request leaves, and its pending blocks are not written."""
        self._keys.pop(request_id, None)
        for entry in self._pending.pop(request_id, []):
            self._drop(entry)  # never written

    def evict(self, block: int) -> None:
        """The block is allocated anew: its entry, if it has one, is removed."""
        self.evictions[block] += self.remove(block)

    def remove(self, block: int) -> bool:
        """The block is about to be written: its entry is removed. Whether it had one."""
        entry = self._by_block.get(block)
        if entry is not None:
            self._drop(entry)
        return entry is not None

    def clear(self) -> None:
        """Remove all entries."""
        for entry in list(self._entries.values()):
            self._drop(entry)
        self._pending.clear()

    def parents(self) -> dict[int, int | None]:
        """Cached blocks -> the cached block before each, None for a first one."""
        return {
            block: entry.parent.block
            if entry.parent is not None and self._by_block.get(entry.parent.block) is entry.parent
            else None
            for block, entry in self._by_block.items()
        }

    def check(self) -> None:
        """Raise RuntimeError unless the invariants hold. For tests."""
        by_key = {entry.block: entry for entry in self._entries.values()}
        if by_key != self._by_block or any(self._entries.get(e.key) is not e for e in self._by_block.values()):
            raise RuntimeError(f"entries by key and by block differ: {self._entries} and {self._by_block}")

    def _chain(self, request: Request, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Keys and tokens of the request's blocks start .. end - 1, whose tokens are all known."""
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
        if self._by_block.get(entry.block) is entry:
            del self._by_block[entry.block]
        entry.parent = None  # so that a chain of dropped entries can be freed
