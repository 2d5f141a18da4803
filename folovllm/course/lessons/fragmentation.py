"""Where KV memory goes under four ways to hand it out, replayed without a model (Kwon et al., SOSP 2023, section 3.1).

The policies::

    max      one contiguous region per request, as long as the model allows (FasterTransformer, the paper's Orca (Max))
    pow2     one contiguous region, the longest it could become rounded up to a power of two, from a buddy allocator
    oracle   one contiguous region of exactly the length it will have in the end, which no real system knows
    paged    blocks taken one by one from the engine's own `BlockManager`

Memory is `capacity` slots, a slot holds the K/V of one token, and in every step each slot is exactly one of these::

    used       K/V of a token stands in it.
    reserved   It belongs to a request that will write it before its end. Until then nobody else can.
    internal   It belongs to a request that will never write it: internal fragmentation.
    external   It is free, and the next in line waits although as many slots as it asks for are free: they lie in
               pieces, none of which is long enough. Then all free slots count: external fragmentation. With blocks
               there are no pieces that are too short, so it is always 0.
    free       It is free, and either nobody waits or what is free is too little in any case.

The second half of the file is arithmetic: what a textbook computes by hand.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from folovllm.course.lessons.allocators import Allocator, Buddy, FirstFit, round_up_pow2
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockPlan
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

POLICIES = ("max", "pow2", "oracle", "paged")
SHARES = ("used", "reserved", "internal", "external", "free")

# --- requests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimRequest:
    """A request as lengths."""

    arrival: int  # the first step that may run it
    prompt_len: int
    output_len: int
    max_tokens: int  # the limit on its output it states

    @property
    def kv_len(self) -> int:
        """Tokens whose K/V is ever written: the last output token is never fed back."""
        return self.prompt_len + self.output_len - 1


def draw_requests(num_requests: int = 200, rate: float = 0.25, longest: int = 1024, seed: int = 0) -> list[SimRequest]:
    """Requests with the skew of chats: most are short, a few are very long. The same ones at every call.

    Lengths are lognormal: prompts with a mean of 161 tokens and sigma 1, outputs with a mean of 338 and sigma 0.9, each
    cut to 1..`longest`. (The means are those that the paper's Fig. 11 gives for ShareGPT.) `max_tokens` is the output
    rounded up to a power of two: users over-estimate by at most 2 x, as the paper assumes for its Orca (Pow2). Gaps
    between arrivals are exponential, `rate` requests per step.
    """
    draw = random.Random(f"fragmentation/{seed}")

    def length(mean: float, sigma: float) -> int:
        # exp(mu + sigma^2 / 2) is the mean.
        return min(max(1, round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))), longest)

    gaps = [draw.expovariate(rate) for _ in range(num_requests)]
    requests = []
    for moment in accumulate(gaps):
        prompt_len, output_len = length(161, 1.0), length(338, 0.9)
        requests.append(SimRequest(int(moment), prompt_len, output_len, round_up_pow2(output_len)))
    return requests


# --- replay ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Life:
    """A request on its way."""

    name: str
    request: SimRequest
    tokens: int  # how many are known
    written: int = 0  # for how many K/V stands in `held` slots of its own
    held: int = 0


class Room(ABC):
    """The memory of a replay: `capacity` slots, and who holds how many."""

    capacity: int

    @abstractmethod
    def write(self, life: Life, others_run: bool) -> bool:
        """Write K/V of all known tokens, of a newcomer or one that runs; False, with nothing changed, without room."""

    @abstractmethod
    def leave(self, life: Life) -> None:
        """Everything the request holds is free again."""

    @abstractmethod
    def external(self, head: Life) -> int:
        """Free slots that are of no use to `head`, which waits, only because they lie in pieces."""


class ContiguousRoom(Room):
    """A region per request, taken once for as much as `wanted` says. Raises ValueError for one that can never fit."""

    def __init__(
        self, allocator: Allocator, wanted: Callable[[SimRequest], int], requests: Iterable[SimRequest]
    ) -> None:
        self.allocator, self.wanted = allocator, wanted
        self.capacity = allocator.num_free
        self._starts: dict[Life, int] = {}
        for request in requests:
            length = allocator.length_for(wanted(request))
            if length > allocator.largest_free or wanted(request) < request.kv_len:
                raise ValueError(f"{request} wants a region of {length}; allowed: {request.kv_len} to {self.capacity}")

    def write(self, life: Life, others_run: bool) -> bool:
        """See `Room`. Once it has a region, a request can always write."""
        if life not in self._starts:
            start = self.allocator.allocate(self.wanted(life.request))
            if start is None:
                return False
            self._starts[life] = start
            life.held = self.allocator.regions[start]
        life.written = life.tokens
        return True

    def leave(self, life: Life) -> None:
        """See `Room`."""
        self.allocator.release(self._starts.pop(life))

    def external(self, head: Life) -> int:
        """See `Room`."""
        free = self.allocator.num_free
        return free if free >= self.allocator.length_for(self.wanted(head.request)) else 0


class PagedRoom(Room):
    """Blocks from the engine's BlockManager. Raises ValueError for a request that can never fit."""

    def __init__(self, manager: BlockManager, requests: Iterable[SimRequest]) -> None:
        self.manager = manager
        self.capacity = manager.usage().capacity
        self._known: dict[Life, Request] = {}
        for request in requests:
            reason = manager.why_never_fits(as_request("", request))
            if reason is not None:
                raise ValueError(f"{request} can never run: {reason}")

    def write(self, life: Life, others_run: bool) -> bool:
        """See `Room`. A newcomer leaves some blocks free for those that run, as in the engine."""
        known = self._known.get(life) or as_request(life.name, life.request)
        newcomer = life not in self._known
        plan = self.manager.allocate_slots(known, life.tokens - life.written, spare=newcomer and others_run)
        if not isinstance(plan, BlockPlan):
            return False
        self.manager.cache_blocks(plan)
        self._known[life] = known
        life.written, life.held = life.tokens, len(plan.block_table) * self.manager.block_size
        return True

    def leave(self, life: Life) -> None:
        """See `Room`."""
        self.manager.free(self._known.pop(life))
        life.written = 0

    def external(self, head: Life) -> int:
        """0: whoever may have a block can use any of them."""
        return 0


def as_request(request_id: str, request: SimRequest) -> Request:
    """What the BlockManager is asked about."""
    params = SamplingParams(max_tokens=request.output_len)
    return Request(request_id, [0] * request.prompt_len, params, (), request.prompt_len + request.output_len)


@dataclass(frozen=True)
class StepUse:
    """One step of a replay: slots of each kind (they sum to the capacity), and how many run and wait."""

    used: int
    reserved: int
    internal: int
    external: int
    free: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Replay:
    """What a policy made of the requests."""

    policy: str
    capacity: int
    steps: list[StepUse]
    preemptions: int  # how often a request lost its K/V, to compute it again

    @property
    def busy(self) -> list[StepUse]:
        """The steps after which somebody waited: those in which memory was what limited. All, if nobody ever did."""
        return [step for step in self.steps if step.waiting] or self.steps

    @property
    def shares(self) -> dict[str, float]:
        """Each kind of slot as a share of the capacity, the mean over the busy steps. They sum to 1."""
        return {name: fmean(getattr(step, name) for step in self.busy) / self.capacity for name in SHARES}

    @property
    def mean_running(self) -> float:
        """Requests that run at once, the mean over the busy steps."""
        return fmean(step.running for step in self.busy)

    @property
    def empty_per_request(self) -> float:
        """Slots that a running request holds and has not written, the mean over requests and all steps."""
        return sum(s.reserved + s.internal for s in self.steps) / sum(s.running for s in self.steps)


def make_room(policy: str, requests: Sequence[SimRequest], capacity: int, max_model_len: int, block_size: int) -> Room:
    """The memory of a policy. Raises ValueError for an unknown one."""
    if policy == "max":
        return ContiguousRoom(FirstFit(capacity), lambda request: max_model_len, requests)
    if policy == "pow2":
        return ContiguousRoom(Buddy(capacity), lambda request: request.prompt_len + request.max_tokens, requests)
    if policy == "oracle":
        return ContiguousRoom(FirstFit(capacity), lambda request: request.kv_len, requests)
    if policy == "paged":
        return PagedRoom(BlockManager(capacity // block_size, block_size), requests)
    raise ValueError(f"policy={policy!r} is not valid; allowed: {', '.join(map(repr, POLICIES))}")


def replay(
    requests: Sequence[SimRequest], policy: str, capacity: int = 16_384, max_model_len: int = 2048, block_size: int = 16
) -> Replay:
    """Serve the requests step by step, first come, first served, as many at once as `capacity` slots hold.

    A request's first step writes its prompt and every other one token more; each step gives it an output token, and
    with the last of them it leaves. Where a running request finds no block, the last to come gives way: it loses its
    K/V, goes to the front of the line and writes all it had in one step when it comes back.
    Raises ValueError for an unknown policy, and for requests that the memory can never hold.
    """
    room = make_room(policy, requests, capacity, max_model_len, block_size)
    in_order = sorted(requests, key=lambda request: request.arrival)
    coming = deque(Life(str(i), request, request.prompt_len) for i, request in enumerate(in_order))
    waiting: deque[Life] = deque()
    running: list[Life] = []
    steps: list[StepUse] = []
    preemptions = 0
    while coming or waiting or running:
        while coming and coming[0].request.arrival <= len(steps):
            waiting.append(coming.popleft())
        gave_way = grow(room, running)
        waiting.extendleft(gave_way)
        preemptions += len(gave_way)
        while waiting and room.write(waiting[0], bool(running)):
            running.append(waiting.popleft())
        steps.append(slots(room, running, waiting))
        for life in running:
            life.tokens += 1
        for life in [life for life in running if life.written == life.request.kv_len]:
            running.remove(life)
            room.leave(life)
    return Replay(policy, room.capacity, steps, preemptions)


def grow(room: Room, running: list[Life]) -> list[Life]:
    """Every running request writes a token; those that had to give way, the last to come first."""
    gave_way: list[Life] = []
    for life in list(running):
        while life in running and not room.write(life, True):
            victim = running.pop()
            room.leave(victim)
            gave_way.append(victim)
    return gave_way


def slots(room: Room, running: Sequence[Life], waiting: Sequence[Life]) -> StepUse:
    """Count the slots of each kind."""
    used = sum(life.written for life in running)
    to_come = sum(min(life.held, life.request.kv_len) for life in running) - used
    held = sum(life.held for life in running)
    external = room.external(waiting[0]) if waiting else 0
    free = room.capacity - held - external
    return StepUse(used, to_come, held - used - to_come, external, free, len(running), len(waiting))


# --- arithmetic ------------------------------------------------------------------------------------------------


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens: 100 tokens take 7 blocks of 16."""
    return -(-num_tokens // block_size)


def region_waste(num_tokens: int, region: int) -> float:
    """The empty share of a region with `num_tokens` tokens in it: 100 tokens in 4096 leave 97.6 % empty."""
    if not 0 < num_tokens <= region:
        raise ValueError(f"num_tokens={num_tokens} is not valid; allowed: 1 to {region}, the region")
    return 1 - num_tokens / region


def paged_waste(num_tokens: int, block_size: int) -> float:
    """The empty share of the blocks that hold `num_tokens` tokens: 12 of 112 slots for 100 tokens in blocks of 16."""
    return region_waste(num_tokens, num_blocks(num_tokens, block_size) * block_size)


def mean_empty_slots(block_size: int) -> float:
    """Empty slots in a request's last block, (B - 1) / 2, if every length modulo B is equally likely."""
    return (block_size - 1) / 2


@dataclass(frozen=True)
class Capacity:
    """What a budget of memory holds."""

    # tokens, blocks: in all
    tokens: int
    blocks: int
    # regions, requests: requests at once, in either way
    regions: int
    requests: int


def capacity_of(budget_bytes: int, bytes_per_token: int, region: int, block_size: int, num_tokens: int) -> Capacity:
    """How many requests of `num_tokens` tokens fit at once if each reserves `region` tokens, and if it takes blocks.

    Llama-2-13B in 16 bits (26 GB) on a 40 GB card leaves about 12 GiB, at 800 KiB per token: 15,728 tokens, so 7
    regions of 2048 or 983 blocks of 16, and those hold 30 requests of 500 tokens.
    """
    tokens = budget_bytes // bytes_per_token
    blocks = tokens // block_size
    return Capacity(tokens, blocks, tokens // region, blocks // num_blocks(num_tokens, block_size))


def translate(address: int, page_size: int, table: Mapping[int, int] | Sequence[int]) -> int:
    """The physical address of a virtual one; or, of a token's position and a block table, its slot in the pool.

    Address 10,000 with pages of 4096 lies on page 2 at offset 1808; if page 2 is in frame 3, that is 14,096. Raises
    ValueError for a page that the table does not have: an operating system would call it a page fault.
    """
    page, offset = divmod(address, page_size)
    frames = dict(enumerate(table)) if isinstance(table, Sequence) else table
    if page not in frames:
        raise ValueError(f"address={address} lies on page {page}; allowed: pages {sorted(frames)}")
    return frames[page] * page_size + offset
