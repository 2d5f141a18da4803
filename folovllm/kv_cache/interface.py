"""What a scheduler may ask of a KV manager, and the operations that a manager may ask of a runner.

A KV manager does the accounting: which memory there is, and which request holds it. It has no tensors. Runners own the
tensors and act on the plans and operations that travel in a `SchedulerOutput`. So one scheduler can drive a reservation
per request (M1, M2) and blocks in a pool (M3, M4).

The life of a request, without forks and swaps::

    why_never_fits -> get_computed_blocks -> allocate_slots -> cache_blocks -> allocate_slots -> ... -> free
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from folovllm.request import Request


@dataclass(frozen=True)
class KVOp:
    """Something a runner has to do to its K/V before the step's forward, in the order given."""


@dataclass(frozen=True)
class BlockCopy(KVOp):
    """Copy the whole block `src` to `dst`, in every layer."""

    src: int
    dst: int


@dataclass(frozen=True)
class SwapOut(KVOp):
    """Copy a block of the device to a block of the host."""

    block: int
    host_block: int


@dataclass(frozen=True)
class SwapIn(KVOp):
    """Copy a block of the host to a block of the device."""

    host_block: int
    block: int


@dataclass(frozen=True)
class KVPlan:
    """Slots for the next `num_tokens` tokens of a request, which has K/V for its first `start` tokens already."""

    request_id: str
    start: int
    num_tokens: int
    ops: tuple[KVOp, ...] = ()  # to be done before the forward

    def written_blocks(self) -> tuple[int, ...]:
        """Blocks that the plan's tokens are written to."""
        return ()

    def reads_any(self, blocks: Container[int]) -> bool:
        """Whether the request's K/V is in any of these blocks."""
        return False


@dataclass(frozen=True)
class BlockPlan(KVPlan):
    """A plan in blocks."""

    block_table: tuple[int, ...] = ()  # all blocks of the request, in order, those for the new tokens included
    first_written: int = field(default=0, compare=False)  # the place in it of the block for the first new token

    def written_blocks(self) -> tuple[int, ...]:
        return self.block_table[self.first_written :]

    def reads_any(self, blocks: Container[int]) -> bool:
        return any(block in blocks for block in self.block_table)


@dataclass(frozen=True)
class KVUsage:
    """Slots for tokens: all, those allocated to requests, and those that hold computed K/V."""

    capacity: int
    reserved: int
    used: int
    unshared: int | None = None  # `reserved` if every request that has run had its own copy of shared blocks

    @property
    def free(self) -> int:
        """Slots that are not allocated."""
        return self.capacity - self.reserved

    @property
    def sharing_saves(self) -> float:
        """The share of memory that sharing saves against a copy for each request; 0 where nothing is shared."""
        return max(0.0, 1 - self.reserved / self.unshared) if self.unshared else 0.0


@dataclass(frozen=True)
class BlockSnapshot:
    """The state of a pool of blocks. Block 0 is the null block."""

    block_size: int
    tables: dict[str, tuple[int, ...]]  # request id -> its blocks on the device
    host_tables: dict[str, tuple[int, ...]]  # request id -> its blocks on the host
    ref_cnt: tuple[int, ...]  # per block: how many tables name it
    filled: tuple[int, ...]  # per block: slots written; a free block that is cached counts as written
    num_free: int
    free: tuple[int, ...] = ()  # the free blocks, in the order in which they will be allocated
    # Blocks that a request can find by their tokens -> the one before each, None for the first of a prompt
    cached: dict[int, int | None] = field(default_factory=dict)
    evictions: tuple[int, ...] = ()  # per block: how often it was allocated anew while it was cached

    @property
    def num_evicted(self) -> int:
        """Evictions of all blocks together."""
        return sum(self.evictions)


class KVCacheManager(ABC):
    """The accounting of the KV cache. Every method is plain Python over ids and counts."""

    can_share = False  # whether a request can start as a `fork`

    @property
    @abstractmethod
    def longest_request(self) -> int:
        """The most tokens, of prompt and output, of a request that has the whole cache. The last one needs no K/V."""

    @abstractmethod
    def why_never_fits(self, request: Request) -> str | None:
        """None if the request fits an otherwise empty cache at its longest; else the arithmetic that says why not."""

    @abstractmethod
    def get_computed_blocks(self, request: Request) -> int:
        """How many of a waiting request's first tokens already have K/V that it may use. Less than `num_tokens`."""

    @abstractmethod
    def allocate_slots(self, request: Request, num_new_tokens: int, spare: bool = False) -> KVPlan | None:
        """Slots for `num_new_tokens` more tokens, all or nothing: a plan, or None with nothing changed.

        spare: leave some memory free, so that running requests need not be preempted at once.
        """

    def fork(self, src: Request, dst: Request, num_tokens: int) -> None:
        """Let `dst`, which holds nothing, start with the K/V of `src`'s first `num_tokens` tokens, shared.

        Raises RuntimeError if `src` has no K/V for that many tokens on the device.
        """
        raise RuntimeError(f"this cache cannot share K/V of {src.request_id!r} with {dst.request_id!r}")

    def can_reclaim(self, idle: Sequence[Request], request: Request) -> bool:
        """Whether freeing all of `idle` frees a block, or saves `request` the copy of one that it writes into."""
        return False

    @abstractmethod
    def cache_blocks(self, plan: KVPlan) -> None:
        """Count the plan's tokens as computed: the forward has written their K/V."""

    @abstractmethod
    def free(self, request: Request) -> None:
        """Free everything that the request holds, which may be nothing."""

    def swap_out(self, request: Request) -> tuple[KVOp, ...] | None:
        """Move the request's K/V to the host by these operations; None, with nothing changed, if it cannot."""
        return None

    def reset_prefix_cache(self) -> None:
        """No new request finds what was computed so far."""
        return

    def snapshot(self) -> BlockSnapshot | None:
        """The state of every block, where there are blocks."""
        return None

    @abstractmethod
    def usage(self) -> KVUsage:
        """How full the cache is now."""
