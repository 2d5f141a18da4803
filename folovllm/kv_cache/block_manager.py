"""Paged KV: every request has a table of blocks, wherever these are (PagedAttention, Kwon et al., SOSP 2023).

vLLM V1 calls this class `KVCacheManager` (`vllm/v1/core/kv_cache_manager.py`).

    table of a request     [ 7 | 2 | 9 ]        token i stands in block table[i // block_size], at i % block_size
    pool                   1 2 3 4 5 6 7 8 9    blocks of one size, in any order, shared where tables name the same one

A request takes a block when it has a token to put there, so only its last block has empty room. A fork names the same
blocks. Whoever writes into a block that others hold too gets a copy of it first (copy-on-write).

With a prefix cache a new request starts with the full blocks of others that hold its own first tokens. Blocks that
nobody holds stay in the cache until they are taken from the front of the free list, least recently used first.

Invariants (between two calls; `check` tests them):
  1. The pool counts for each block exactly the tables that name it; the host pool likewise.
  2. A request holds device blocks or host blocks, never both. Its K/V is its first `computed` tokens.
  3. blocks_for(computed) <= len(blocks); a swapped-out request has exactly blocks_for(computed) host blocks.
  4. No slot is promised to two requests: when a plan is made, its slots lie in blocks that its request alone holds.
  5. used == the sum over held blocks of the slots that were written in them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

from folovllm.kv_cache.block_pool import NULL_BLOCK, BlockPool
from folovllm.kv_cache.interface import (
    Awaited,
    BlockCopy,
    BlockPlan,
    BlockSnapshot,
    KVCacheManager,
    KVFork,
    KVOp,
    KVPlan,
    KVUsage,
    SwapIn,
    SwapOut,
)
from folovllm.kv_cache.prefix_cache import CachedBlock, PrefixCache
from folovllm.request import Request

WATERMARK = 0.01  # share of the pool that an admission leaves free: vLLM V0's value; a newer V1 has 0.0


@dataclass
class BlockTable:
    """One request's K/V: `computed` tokens in `blocks`, in order, or in `host_blocks` while it is swapped out."""

    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    computed: int = 0
    chain: list[CachedBlock] = field(default_factory=list)  # the prefix cache's entries for its full blocks
    caches: bool = True  # whether it makes such entries


class BlockManager(KVCacheManager):
    """Books of a pool of `num_blocks` blocks of `block_size` tokens, and of `num_host_blocks` to swap to.

    cache: the index of blocks by their tokens; None to share nothing but forks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_host_blocks: int = 0, cache: PrefixCache | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}; allowed: integers >= 1")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks)
        self.cache = cache
        self.watermark = int(WATERMARK * num_blocks)
        self._tables: dict[str, BlockTable] = {}
        self._filled = [0] * (num_blocks + 1)  # slots written, per block that is held
        self._used = 0
        self._evictions = [0] * (num_blocks + 1)  # how often each block was given away with cached tokens in it

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def why_never_fits(self, request: Request) -> str | None:
        """None, or why the request at its longest needs more blocks than there are."""
        needed = self.blocks_for(request.max_total_tokens)
        if needed <= self.pool.num_blocks:
            return None
        return (
            f"it may grow to {request.max_total_tokens} tokens ({request.num_prompt_tokens} of prompt and "
            f"{request.max_output_tokens} of output), which take {needed} blocks of {self.block_size}, and the whole "
            f"KV cache has {self.pool.num_blocks}"
        )

    def get_computed_blocks(self, request: Request) -> int:
        """The tokens that wait on the host if the request was swapped out; else those of cached blocks."""
        table = self._tables.get(request.request_id)
        return table.computed if table is not None else len(self._hits(request)) * self.block_size

    def awaited(self, request: Request) -> Awaited | None:
        """The running request that has promised the block after those that are cached, and how far its promises go."""
        found = self._find(request)
        promised = found[sum(entry.block is not None for entry in found) :]
        if not promised or promised[0].writer is None:
            return None
        writer = promised[0].writer
        until = len(found) - len(promised)
        for entry in promised:
            if entry.writer != writer or entry.block is not None:
                break
            until += 1
        return Awaited(writer, until * self.block_size)

    def _find(self, request: Request) -> list[CachedBlock]:
        """Cached blocks with the first tokens of a request that holds nothing; one token is always left to compute."""
        if self.cache is None or request.request_id in self._tables:
            return []
        return self.cache.find(request, (request.num_tokens - 1) // self.block_size)

    def _hits(self, request: Request) -> list[CachedBlock]:
        return list(takewhile(lambda entry: entry.block is not None, self._find(request)))

    def allocate_slots(self, request: Request, num_new_tokens: int, spare: bool = False) -> BlockPlan | None:
        """Blocks for `num_new_tokens` more tokens, after those cached, and back from the host what was swapped out."""
        table = self._tables.get(request.request_id)
        hits: list[int] = []
        if table is None:
            chain = self._hits(request)
            hits = [entry.block for entry in chain if entry.block is not None]
            table = BlockTable(list(hits), computed=len(hits) * self.block_size, chain=chain)
        missing = max(0, self.blocks_for(table.computed + num_new_tokens) - len(table.blocks))
        shared = self._shared_block(table)
        wanted = missing + (shared is not None) + sum(self.pool.ref_cnt[block] == 0 for block in hits)
        if wanted > 0 and wanted > self.pool.num_free - (self.watermark if spare else 0):
            return None
        self._take(hits)  # before any free block is taken, or the request would evict what it has found
        ops: list[KVOp] = []
        if shared is not None:
            source = table.blocks[shared]
            (copy,) = self._allocate(1)
            self._fill(copy, table.computed % self.block_size)
            self._release(self.pool.free_blocks([source]))
            table.blocks[shared] = copy
            ops.append(BlockCopy(source, copy))
        table.blocks += self._allocate(missing)
        if table.host_blocks:
            for index, (host, block) in enumerate(zip(table.host_blocks, table.blocks, strict=False)):
                self._fill(block, min(self.block_size, table.computed - index * self.block_size))
                ops.append(SwapIn(host, block))
            self.host_pool.free_blocks(table.host_blocks)
            table.host_blocks = []
        self._tables[request.request_id] = table
        if self.cache is not None and table.caches:
            num_full = (table.computed + num_new_tokens) // self.block_size
            self.cache.extend(request, table.chain, table.blocks, num_full)
        return BlockPlan(request.request_id, table.computed, num_new_tokens, tuple(ops), tuple(table.blocks))

    def fork(self, src: Request, dst: Request, num_tokens: int) -> KVFork | None:
        """`dst` names the same blocks, a partly filled last one included. It costs nothing."""
        source = self._tables.get(src.request_id)
        if source is None or num_tokens > source.computed or source.host_blocks:
            raise RuntimeError(f"request {src.request_id!r} has no K/V for {num_tokens} tokens to fork")
        blocks = source.blocks[: self.blocks_for(num_tokens)]
        self.pool.touch(blocks)
        chain = source.chain[: num_tokens // self.block_size]
        self._tables[dst.request_id] = BlockTable(blocks, computed=num_tokens, chain=chain, caches=source.caches)
        return KVFork(num_tokens)

    def cache_blocks(self, plan: KVPlan) -> None:
        """Count the plan's tokens as computed."""
        table = self._tables[plan.request_id]
        end = plan.start + plan.num_tokens
        if plan.start != table.computed or self.blocks_for(end) > len(table.blocks):
            raise RuntimeError(f"{plan} does not continue {table.computed} tokens in {len(table.blocks)} blocks")
        for index in range(plan.start // self.block_size, self.blocks_for(end)):
            self._fill(table.blocks[index], min(self.block_size, end - index * self.block_size))
        table.computed = end
        if self.cache is not None:
            self.cache.commit(plan.request_id)

    def free(self, request: Request) -> None:
        """Let go of all blocks, the last first: so a request's tail is taken by others before its head."""
        self.withdraw(request)
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            self._release(self.pool.free_blocks(reversed(table.blocks)))
            self.host_pool.free_blocks(reversed(table.host_blocks))

    def withdraw(self, request: Request) -> None:
        """Its promises go, and so do entries of blocks that it has not written."""
        if self.cache is not None:
            self.cache.forget(request.request_id)

    def swap_out(self, request: Request) -> tuple[KVOp, ...] | None:
        """Move the request's K/V to the host; None, with the books unchanged, if there is none or no room for it."""
        table = self._tables[request.request_id]
        needed = self.blocks_for(table.computed)
        if not 0 < needed <= self.host_pool.num_free:
            return None
        self.withdraw(request)
        host_blocks = self.host_pool.get_new_blocks(needed)
        ops = tuple(SwapOut(b, h) for b, h in zip(table.blocks, host_blocks, strict=False))
        self._release(self.pool.free_blocks(reversed(table.blocks)))
        table.blocks, table.host_blocks = [], host_blocks
        return ops

    def can_fork(self, request: Request, num_tokens: int) -> bool:
        """Whether the request's K/V is on the device and has that many tokens."""
        table = self._tables.get(request.request_id)
        return table is not None and bool(table.blocks) and table.computed >= num_tokens

    def reset_prefix_cache(self) -> None:
        """No block is found any more, not even those of requests that run now."""
        if self.cache is not None:
            self.cache.clear()
        for table in self._tables.values():
            table.chain, table.caches = [], False

    def usage(self) -> KVUsage:
        """Held blocks, each counted once however many tables name it, and the slots written in them."""
        size = self.block_size
        named = sum(len(table.blocks) for table in self._tables.values())
        return KVUsage(self.pool.num_blocks * size, self.pool.num_held * size, self._used, named * size)

    def snapshot(self) -> BlockSnapshot:
        """Everything a block map shows."""
        cached = {} if self.cache is None else self.cache.parents()
        return BlockSnapshot(
            self.block_size,
            {i: tuple(table.blocks) for i, table in self._tables.items() if table.blocks},
            {i: tuple(table.host_blocks) for i, table in self._tables.items() if table.host_blocks},
            tuple(self.pool.ref_cnt),
            tuple(self.block_size if b in cached and not self._filled[b] else n for b, n in enumerate(self._filled)),
            self.pool.num_free,
            tuple(self.pool.free_list()),
            cached,
            tuple(self._evictions),
        )

    def check(self) -> None:
        """Raise RuntimeError unless the invariants hold. For tests: it looks at every block."""
        for pool, tables in (
            (self.pool, [t.blocks for t in self._tables.values()]),
            (self.host_pool, [t.host_blocks for t in self._tables.values()]),
        ):
            named = Counter(block for table in tables for block in table)
            counted = {block: count for block, count in enumerate(pool.ref_cnt) if count}
            free = pool.free_list()
            if counted != named or NULL_BLOCK in named:
                raise RuntimeError(f"reference counts {counted} and tables {dict(named)} differ")
            if len(free) + len(counted) != pool.num_blocks or set(free) & set(counted):
                raise RuntimeError(f"{len(free)} free and {len(counted)} held blocks of {pool.num_blocks}")
        for request_id, table in self._tables.items():
            needed = self.blocks_for(table.computed)
            if table.host_blocks and (table.blocks or len(table.host_blocks) != needed):
                raise RuntimeError(f"{request_id!r} is swapped out with {table}")
            if not table.host_blocks and len(table.blocks) < needed:
                raise RuntimeError(f"{request_id!r} has {len(table.blocks)} blocks for {table.computed} tokens")
        if self._used != sum(self._filled) or any(
            self._filled[block] for block in range(len(self._filled)) if not self.pool.ref_cnt[block]
        ):
            raise RuntimeError(f"{self._used} slots used, and filled {self._filled}")
        if self.cache is not None:
            self.cache.check()

    def _shared_block(self, table: BlockTable) -> int | None:
        """The index of the block that the next token goes into, if others hold it too."""
        index = table.computed // self.block_size
        if index < len(table.blocks) and self.pool.ref_cnt[table.blocks[index]] > 1:
            return index
        return None

    def _allocate(self, count: int) -> list[int]:
        """Free blocks, those first that nobody has used for longest. What was cached in them is lost."""
        blocks = self.pool.get_new_blocks(count)
        if self.cache is not None:
            for block in blocks:
                num_cached = len(self.cache)
                self.cache.evict(block)
                self._evictions[block] += num_cached - len(self.cache)
        return blocks

    def _take(self, hits: list[int]) -> None:
        """Hold cached blocks, whether others hold them or nobody."""
        for block in hits:
            if self.pool.ref_cnt[block] == 0:
                self._fill(block, self.block_size)
        self.pool.touch(hits)

    def _fill(self, block: int, filled: int) -> None:
        """Slots of a block are written, up to `filled`."""
        self._used += max(0, filled - self._filled[block])
        self._filled[block] = max(filled, self._filled[block])

    def _release(self, freed: list[int]) -> None:
        for block in freed:
            self._used -= self._filled[block]
            self._filled[block] = 0
