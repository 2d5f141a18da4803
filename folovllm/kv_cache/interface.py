"""What a scheduler may ask of a KV manager, and the operations a manager may ask of a runner.

A KV manager keeps books only: it knows how much room there is and who holds it, never a tensor. Runners own the
tensors and act on the plans and operations that travel in a `SchedulerOutput`. That is what lets one scheduler drive a
reservation per request (M1, M2) and blocks in a pool alike.

The life of a request::

    why_never_fits -> get_computed_blocks -> allocate_slots -> cache_blocks -> allocate_slots -> ... -> free
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from folovllm.request import Request


@dataclass(frozen=True)
class KVOp:
    """Something a runner has to do to its K/V before the step's forward, in the order given."""


@dataclass(frozen=True)
class KVCopy(KVOp):
    """Give `dst` a copy of the K/V of `src`'s first `num_tokens` tokens."""

    src: str
    dst: str
    num_tokens: int


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
    """Room for the next `num_tokens` tokens of a request, which has K/V for its first `start` tokens already."""

    request_id: str
    start: int
    num_tokens: int
    ops: tuple[KVOp, ...] = ()  # what has to happen to the K/V first, if anything


@dataclass(frozen=True)
class BlockPlan(KVPlan):
    """A plan in blocks."""

    block_table: tuple[int, ...] = ()  # all blocks of the request, in order, those for the new tokens included


@dataclass(frozen=True)
class KVFork:
    """A request starts with another's K/V of its first `num_tokens` tokens: copied by `ops`, or shared without any."""

    num_tokens: int
    ops: tuple[KVOp, ...] = ()


@dataclass(frozen=True)
class Awaited:
    """A running request that will compute the K/V of tokens which another one has in common with it."""

    request_id: str
    num_tokens: int  # how many of the first tokens both of them know to have K/V then


@dataclass(frozen=True)
class KVUsage:
    """Room, in tokens: the whole, what is set aside for requests, and what holds K/V that was computed."""

    capacity: int
    reserved: int
    used: int
    unshared: int | None = None  # what `reserved` would be if nobody shared a block with anybody else

    @property
    def free(self) -> int:
        """Tokens that nobody has set aside."""
        return self.capacity - self.reserved

    @property
    def sharing_saves(self) -> float:
        """The share of room that sharing saves against a copy for each request; 0 where nothing is shared."""
        return 1 - self.reserved / self.unshared if self.unshared else 0.0


@dataclass(frozen=True)
class BlockSnapshot:
    """The state of a pool of blocks. Block 0 is the null block."""

    block_size: int
    # tables, host_tables: request id -> its blocks on the device, or on the host
    tables: dict[str, tuple[int, ...]]
    host_tables: dict[str, tuple[int, ...]]
    # ref_cnt, filled: per block, how many tables name it and how many of its slots are written; a free block that is
    # cached counts as written
    ref_cnt: tuple[int, ...]
    filled: tuple[int, ...]
    num_free: int
    free: tuple[int, ...] = ()  # the free blocks, in the order in which they will be taken
    # Blocks that a request may find by their tokens -> the one before each, None for the first of a prompt
    cached: dict[int, int | None] = field(default_factory=dict)
    evictions: tuple[int, ...] = ()  # per block, how often it was given to somebody else while it was cached, so far

    @property
    def num_evicted(self) -> int:
        """Cached blocks that were given to somebody else, so far."""
        return sum(self.evictions)


class KVCacheManager(ABC):
    """The books of the KV cache. Every method is plain Python over ids and counts."""

    @abstractmethod
    def why_never_fits(self, request: Request) -> str | None:
        """None if the request fits an otherwise empty cache at its longest; else the arithmetic that says why not."""

    @abstractmethod
    def get_computed_blocks(self, request: Request) -> int:
        """How many of the request's first tokens already have K/V that it may use. Less than `num_tokens`."""

    def awaited(self, request: Request) -> Awaited | None:
        """Who is about to compute what comes after the match, if somebody who runs is."""
        return None

    @abstractmethod
    def allocate_slots(self, request: Request, num_new_tokens: int, spare: bool = False) -> KVPlan | None:
        """Room for `num_new_tokens` more tokens, all or nothing: a plan, or None with the books unchanged.

        spare: leave some room free for those that run already, so that they need not give way at once.
        """

    @abstractmethod
    def fork(self, src: Request, dst: Request, num_tokens: int) -> KVFork | None:
        """Let `dst`, which holds nothing, start with the K/V of `src`'s first `num_tokens` tokens.

        `src` has K/V for at least that many. None, with the books unchanged, if there is no room.
        """

    @abstractmethod
    def cache_blocks(self, plan: KVPlan) -> None:
        """The forward that the plan was made for has written its K/V."""

    @abstractmethod
    def free(self, request: Request) -> None:
        """Everything the request holds is free again. A request that holds nothing may be released too."""

    def withdraw(self, request: Request) -> None:
        """The request will compute no more: nobody is to wait for it, or to find what it has not written."""
        return

    def swap_out(self, request: Request) -> tuple[KVOp, ...] | None:
        """Move the request's K/V to the host by these operations; None, with the books unchanged, if that cannot be."""
        return None

    def can_fork(self, request: Request, num_tokens: int) -> bool:
        """Whether K/V of the request's first `num_tokens` tokens is where `fork` can take it from."""
        return request.num_computed_tokens >= num_tokens

    def reset_prefix_cache(self) -> None:
        """Nothing that was computed so far is found by new requests."""
        return

    def snapshot(self) -> BlockSnapshot | None:
        """The state of every block, where there are blocks."""
        return None

    @abstractmethod
    def usage(self) -> KVUsage:
        """How full the cache is now."""
