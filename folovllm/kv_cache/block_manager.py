"""Paged KV: every request has a table of blocks, wherever these are (PagedAttention, Kwon et al., SOSP 2023).

vLLM V1 calls this class `KVCacheManager` (`vllm/v1/core/kv_cache_manager.py`).

    table of a request     [ 7 | 2 | 9 ]        token i is in block table[i // block_size], in slot i % block_size
    pool                   1 2 3 4 5 6 7 8 9    blocks of one size, in any order, shared if several tables name them

A block is allocated when a request has a token to put there, so only a request's last block has empty slots. A fork
names the same blocks. A request that writes into a block that others hold too gets a copy of it first (copy-on-write).

With a prefix cache a new request starts with the full blocks of others that hold its own first tokens. Free blocks stay
in the cache until they are allocated anew from the front of the free list, least recently used first.

Invariants (between two calls; `check` tests them):
  1. A block's reference count is the number of tables that name it; the host pool likewise.
  2. A request holds device blocks or host blocks, never both. Its K/V is that of its first `computed` tokens.
  3. blocks_for(computed) <= len(blocks); a swapped-out request has exactly blocks_for(computed) host blocks.
  4. When a plan is made, the slots that it writes are in blocks that no other request holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from folovllm.kv_cache.block_pool import NULL_BLOCK, BlockPool
from folovllm.kv_cache.interface import (
    BlockCopy,
    BlockPlan,
    BlockSnapshot,
    KVCacheManager,
    KVOp,
    KVPlan,
    KVUsage,
    SwapIn,
    SwapOut,
)
from folovllm.kv_cache.prefix_cache import CachedBlock, PrefixCache
from folovllm.math_utils import cdiv
from folovllm.request import Request

WATERMARK = 0.01  # share of the pool that an admission leaves free: vLLM V0's value; a newer V1 has 0.0


@dataclass
class BlockTable:
    """One request's K/V: `computed` tokens in `blocks`, in order, or in `host_blocks` while it is swapped out."""

    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    computed: int = 0
    chain: list[CachedBlock] = field(default_factory=list)  # the prefix cache's entries for its full blocks
    caches: bool = True  # whether its further blocks enter the cache
    has_run: bool = False  # False for a fork that waits


class BlockManager(KVCacheManager):
    """Allocates `num_blocks` blocks of `block_size` tokens, and `num_host_blocks` to swap to.

    cache: the index of blocks by their tokens; None to share blocks between forks only.
    """

    can_share = True

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

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return cdiv(num_tokens, self.block_size)

    @property
    def longest_request(self) -> int:
        return self.pool.num_blocks * self.block_size + 1

    def why_never_fits(self, request: Request) -> str | None:
        """None, or why the request at its longest needs more blocks than there are."""
        needed = self.blocks_for(request.max_total_tokens - 1)
        if needed <= self.pool.num_blocks:
            return None
        return (
            f"it may grow to {request.max_total_tokens} tokens ({request.num_prompt_tokens} of prompt and "
            f"{request.max_output_tokens} of output), all but the last of which take {needed} blocks of "
            f"{self.block_size}, and the whole KV cache has {self.pool.num_blocks}"
        )

    def get_computed_blocks(self, request: Request) -> int:
        """Tokens that a waiting request has K/V for: forked, swapped out, or in cached blocks."""
        table = self._tables.get(request.request_id)
        return table.computed if table is not None else len(self._hits(request)) * self.block_size

    def _hits(self, request: Request) -> list[CachedBlock]:
        """Cached blocks with the first tokens of a request that holds nothing; one token is left to compute."""
        if self.cache is None or request.lacks_prompt_logprobs:  # it needs the logits of each prompt token
            return []
        return self.cache.find(request, (request.num_tokens - 1) // self.block_size)

    def allocate_slots(self, request: Request, num_new_tokens: int, spare: bool = False) -> BlockPlan | None:
        """Slots for `num_new_tokens` tokens after those that have K/V. Cached and swapped-out blocks join the table."""
        table = self._tables.get(request.request_id)
        hits: list[int] = []
        if table is None:
            chain = self._hits(request)
            hits = [entry.block for entry in chain]
            table = BlockTable(list(hits), computed=len(hits) * self.block_size, chain=chain)
        end = table.computed + num_new_tokens
        num_new_blocks = max(0, self.blocks_for(end) - len(table.blocks))
        first = table.computed // self.block_size  # the block that the next token goes into
        copy_first = first < len(table.blocks) and self.pool.ref_cnt[table.blocks[first]] > 1
        from_free_list = num_new_blocks + copy_first + sum(self.pool.ref_cnt[block] == 0 for block in hits)
        if from_free_list > 0 and from_free_list > self.pool.num_free - (self.watermark if spare else 0):
            return None
        self.pool.touch(hits)  # before any block is allocated, which could be one of these
        ops: list[KVOp] = []
        if copy_first:
            ops.append(self._copy_on_write(table, first))
        elif self.cache is not None and first < len(table.blocks):
            self.cache.remove(table.blocks[first])  # a fork may share the beginning of a block that is full and cached
        table.blocks += self._get_new_blocks(num_new_blocks)
        if table.host_blocks:
            ops += self._swap_in(table)
        table.has_run = True
        self._tables[request.request_id] = table
        if self.cache is not None and table.caches:
            self.cache.extend(request, table.chain, table.blocks, end // self.block_size)
        return BlockPlan(request.request_id, table.computed, num_new_tokens, tuple(ops), tuple(table.blocks), first)

    def _get_new_blocks(self, count: int) -> list[int]:
        """Allocate the blocks that have been free longest. What was cached in them is lost."""
        blocks = self.pool.get_new_blocks(count)
        if self.cache is not None:
            for block in blocks:
                self.cache.evict(block)
        return blocks

    def _copy_on_write(self, table: BlockTable, index: int) -> BlockCopy:
        """Put a copy in the place of a block that others hold too."""
        source = table.blocks[index]
        (copy,) = self._get_new_blocks(1)
        self.pool.fill(copy, table.computed % self.block_size)
        self.pool.free_blocks([source])
        table.blocks[index] = copy
        return BlockCopy(source, copy)

    def _swap_in(self, table: BlockTable) -> list[SwapIn]:
        """Free the host blocks. Their K/V goes to the first device blocks of the table."""
        self._fill(table, 0, table.computed)
        ops = [SwapIn(host, block) for host, block in zip(table.host_blocks, table.blocks, strict=False)]
        self.host_pool.free_blocks(table.host_blocks)
        table.host_blocks = []
        return ops

    def _fill(self, table: BlockTable, start: int, end: int) -> None:
        """The slots of tokens [start, end) are written, all before them too."""
        for index in range(start // self.block_size, self.blocks_for(end)):
            self.pool.fill(table.blocks[index], min(self.block_size, end - index * self.block_size))

    def fork(self, src: Request, dst: Request, num_tokens: int) -> None:
        """`dst` names the same blocks, also a partly filled last one. It needs no new block."""
        source = self._tables.get(src.request_id)
        if source is None or num_tokens > source.computed or source.host_blocks:
            raise RuntimeError(f"request {src.request_id!r} has no K/V for {num_tokens} tokens to fork")
        blocks = source.blocks[: self.blocks_for(num_tokens)]
        self.pool.touch(blocks)
        chain = source.chain[: num_tokens // self.block_size]
        self._tables[dst.request_id] = BlockTable(blocks, computed=num_tokens, chain=chain, caches=source.caches)

    def can_reclaim(self, idle: Sequence[Request], request: Request) -> bool:
        """Whether `idle` alone hold a block, or alone share the one that `request` writes into next."""
        idle_refs = Counter(block for r in idle for block in self._tables[r.request_id].blocks)
        table = self._tables.get(request.request_id, BlockTable())
        written = table.blocks[table.computed // self.block_size :]
        return any(self.pool.ref_cnt[block] - refs == (block in written) for block, refs in idle_refs.items())

    def cache_blocks(self, plan: KVPlan) -> None:
        """Count the plan's tokens as computed. Blocks that it filled are no longer pending."""
        table = self._tables[plan.request_id]
        end = plan.start + plan.num_tokens
        if plan.start != table.computed or self.blocks_for(end) > len(table.blocks):
            raise RuntimeError(f"{plan} does not continue {table.computed} tokens in {len(table.blocks)} blocks")
        self._fill(table, plan.start, end)
        table.computed = end
        if self.cache is not None:
            self.cache.commit(plan.request_id)

    def free(self, request: Request) -> None:
        """Free all blocks, the last first, so that a request's last blocks are evicted before its first."""
        if self.cache is not None:
            self.cache.forget(request.request_id)
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            self.pool.free_blocks(reversed(table.blocks))
            self.host_pool.free_blocks(reversed(table.host_blocks))

    def swap_out(self, request: Request) -> tuple[KVOp, ...] | None:
        """Move the request's K/V to the host; None, with nothing changed, if it has none or it does not fit there."""
        table = self._tables[request.request_id]
        needed = self.blocks_for(table.computed)
        if not 0 < needed <= self.host_pool.num_free:
            return None
        self.free(request)
        host_blocks = self.host_pool.get_new_blocks(needed)
        self._tables[request.request_id] = replace(table, blocks=[], host_blocks=host_blocks)
        return tuple(SwapOut(block, host) for block, host in zip(table.blocks, host_blocks, strict=False))

    def reset_prefix_cache(self) -> None:
        """No block is found any more, not even those of requests that run now."""
        if self.cache is not None:
            self.cache.clear()
        for table in self._tables.values():
            table.chain, table.caches = [], False

    def usage(self) -> KVUsage:
        """Held blocks, each counted once however many tables name it, and the slots written in them."""
        size = self.block_size
        named = sum(len(table.blocks) for table in self._tables.values() if table.has_run)
        used = self.pool.num_used_slots
        return KVUsage(self.pool.num_blocks * size, self.pool.num_held * size, used, named * size)

    def snapshot(self) -> BlockSnapshot:
        """Everything a block map shows."""
        cached = {} if self.cache is None else self.cache.parents()
        evictions = {} if self.cache is None else self.cache.evictions
        blocks = range(self.pool.num_blocks + 1)
        return BlockSnapshot(
            self.block_size,
            {i: tuple(table.blocks) for i, table in self._tables.items() if table.blocks},
            {i: tuple(table.host_blocks) for i, table in self._tables.items() if table.host_blocks},
            tuple(self.pool.ref_cnt),
            tuple(self.pool.filled[b] if self.pool.ref_cnt[b] or b in cached else 0 for b in blocks),
            self.pool.num_free,
            tuple(self.pool.free_list()),
            cached,
            tuple(evictions.get(b, 0) for b in blocks),
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
            if pool.num_used_slots != sum(pool.filled[block] for block in counted):
                raise RuntimeError(f"{pool.num_used_slots} slots used, and filled {pool.filled}")
        for request_id, table in self._tables.items():
            needed = self.blocks_for(table.computed)
            if table.host_blocks and (table.blocks or len(table.host_blocks) != needed):
                raise RuntimeError(f"{request_id!r} is swapped out with {table}")
            if not table.host_blocks and len(table.blocks) < needed:
                raise RuntimeError(f"{request_id!r} has {len(table.blocks)} blocks for {table.computed} tokens")
        if self.cache is not None:
            self.cache.check()
