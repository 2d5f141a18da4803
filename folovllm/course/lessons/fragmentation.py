"""How KV memory is used under four allocation policies, replayed without a model (Kwon et al., SOSP 2023, sec. 3.1).

The policies::

    max      one contiguous region per request, as long as the model allows (FasterTransformer, the paper's Orca (Max))
    pow2     one contiguous region, the request's maximum length rounded up to a power of two, from a buddy allocator
    oracle   one contiguous region of exactly the request's final length, which no real system knows
    paged    blocks from the engine's own `BlockManager`, one by one

Memory is `capacity` slots, a slot holds the K/V of one token, and in every step each slot is exactly one of these::

    used       holds the K/V of a token
    reserved   held by a request that will write it later; no other request can use it until then
    internal   held by a request that will never write it: internal fragmentation
    external   free, but the head of the queue waits although enough slots are free in total: no gap is long enough.
               All free slots then count as external fragmentation. With blocks it is always 0.
    free       free, and no request waits, or the head of the queue needs more slots than are free in total

The second half of the file is arithmetic that a textbook does by hand.
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
    """A request without text: only its lengths."""

    arrival: int  # the first step that may run it
    prompt_len: int
    output_len: int
    max_tokens: int  # the limit on its output that the user states

    @property
    def kv_len(self) -> int:
        """Tokens whose K/V is written in the end: the last output token is never fed back."""
        return self.prompt_len + self.output_len - 1


def draw_requests(num_requests: int = 200, rate: float = 0.25, longest: int = 1024, seed: int = 0) -> list[SimRequest]:
    """Seeded requests with the skew of chats: most are short, a few are very long.

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
class LiveRequest:
    """A request during a replay."""

    name: str
    request: SimRequest
    tokens: int  # of prompt and output so far
    written: int = 0  # tokens whose K/V is written
    held: int = 0  # slots


class Memory(ABC):
    """The memory of a replay: `capacity` slots, and which request holds how many."""

    capacity: int

    @abstractmethod
    def write(self, live: LiveRequest, others_run: bool) -> bool:
        """Write the K/V of all its tokens so far. Returns False, with nothing changed, if memory does not suffice."""

    @abstractmethod
    def free(self, live: LiveRequest) -> None:
        """Free every slot that the request holds."""

    @abstractmethod
    def external(self, head: LiveRequest) -> int:
        """Free slots that the waiting request `head` cannot use only because they are not contiguous."""


class ContiguousMemory(Memory):
    """One region of `wanted(request)` slots per request. Raises ValueError for a request that can never fit."""

    def __init__(
        self, allocator: Allocator, wanted: Callable[[SimRequest], int], requests: Iterable[SimRequest]
    ) -> None:
        self.allocator, self.wanted = allocator, wanted
        self.capacity = allocator.num_free
        self._starts: dict[LiveRequest, int] = {}
        for request in requests:
            length = allocator.length_for(wanted(request))
            if length > allocator.largest_free or wanted(request) < request.kv_len:
                raise ValueError(f"{request} wants a region of {length}; allowed: {request.kv_len} to {self.capacity}")

    def write(self, live: LiveRequest, others_run: bool) -> bool:
        if live not in self._starts:
            start = self.allocator.allocate(self.wanted(live.request))
            if start is None:
                return False
            self._starts[live] = start
            live.held = self.allocator.regions[start]
        live.written = live.tokens  # always possible: the region has its maximum length
        return True

    def free(self, live: LiveRequest) -> None:
        self.allocator.release(self._starts.pop(live))

    def external(self, head: LiveRequest) -> int:
        free = self.allocator.num_free
        return free if free >= self.allocator.length_for(self.wanted(head.request)) else 0


class PagedMemory(Memory):
    """Blocks from the engine's BlockManager. Raises ValueError for a request that can never fit."""

    def __init__(self, manager: BlockManager, requests: Iterable[SimRequest]) -> None:
        self.manager = manager
        self.capacity = manager.usage().capacity
        self._known: dict[LiveRequest, Request] = {}
        for request in requests:
            reason = manager.why_never_fits(as_request("", request))
            if reason is not None:
                raise ValueError(f"{request} can never run: {reason}")

    def write(self, live: LiveRequest, others_run: bool) -> bool:
        known = self._known.get(live) or as_request(live.name, live.request)
        spare = live not in self._known and others_run  # the watermark, as in the engine
        plan = self.manager.allocate_slots(known, live.tokens - live.written, spare=spare)
        if not isinstance(plan, BlockPlan):
            return False
        self.manager.cache_blocks(plan)
        self._known[live] = known
        live.written, live.held = live.tokens, len(plan.block_table) * self.manager.block_size
        return True

    def free(self, live: LiveRequest) -> None:
        self.manager.free(self._known.pop(live))
        live.written = 0

    def external(self, head: LiveRequest) -> int:
        return 0  # any free block can be used


def as_request(request_id: str, request: SimRequest) -> Request:
    """The request in the form that the BlockManager takes."""
    params = SamplingParams(max_tokens=request.output_len)
    return Request(request_id, [0] * request.prompt_len, params, (), request.prompt_len + request.output_len)


@dataclass(frozen=True)
class StepUse:
    """One step of a replay: slots of each kind (they sum to the capacity), and running and waiting requests."""

    used: int
    reserved: int
    internal: int
    external: int
    free: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Replay:
    """A served workload under one policy."""

    policy: str
    capacity: int
    steps: list[StepUse]
    preemptions: int

    @property
    def busy(self) -> list[StepUse]:
        """The steps with waiting requests, in which memory was the limit. If there are none, all steps."""
        return [step for step in self.steps if step.waiting] or self.steps

    @property
    def shares(self) -> dict[str, float]:
        """Each kind of slot as a share of the capacity, averaged over the busy steps. The shares sum to 1."""
        return {name: fmean(getattr(step, name) for step in self.busy) / self.capacity for name in SHARES}

    @property
    def mean_running(self) -> float:
        """Running requests, averaged over the busy steps."""
        return fmean(step.running for step in self.busy)

    @property
    def empty_per_request(self) -> float:
        """Held slots without K/V per running request, averaged over requests and all steps."""
        return sum(s.reserved + s.internal for s in self.steps) / sum(s.running for s in self.steps)


def make_memory(
    policy: str, requests: Sequence[SimRequest], capacity: int, max_model_len: int, block_size: int
) -> Memory:
    """The memory of a policy. Raises ValueError for an unknown policy."""
    if policy == "max":
        return ContiguousMemory(FirstFit(capacity), lambda request: max_model_len, requests)
    if policy == "pow2":
        return ContiguousMemory(Buddy(capacity), lambda request: request.prompt_len + request.max_tokens, requests)
    if policy == "oracle":
        return ContiguousMemory(FirstFit(capacity), lambda request: request.kv_len, requests)
    if policy == "paged":
        return PagedMemory(BlockManager(capacity // block_size, block_size), requests)
    raise ValueError(f"policy={policy!r} is not valid; allowed: {', '.join(map(repr, POLICIES))}")


def replay(
    requests: Sequence[SimRequest], policy: str, capacity: int = 16_384, max_model_len: int = 2048, block_size: int = 16
) -> Replay:
    """Serve the requests step by step, first come, first served, as many at once as `capacity` slots hold.

    A request's first step writes its prompt, every later step one more token. Each step samples one output token, and
    the last one ends the request. If a running request finds no free block, the last admitted request is preempted: its
    K/V is dropped, it goes to the head of the queue, and it recomputes its K/V in one step when it resumes.
    Raises ValueError for an unknown policy, and for requests that the memory can never hold.
    """
    memory = make_memory(policy, requests, capacity, max_model_len, block_size)
    in_order = sorted(requests, key=lambda request: request.arrival)
    coming = deque(LiveRequest(str(i), request, request.prompt_len) for i, request in enumerate(in_order))
    waiting: deque[LiveRequest] = deque()
    running: list[LiveRequest] = []
    steps: list[StepUse] = []
    preemptions = 0
    while coming or waiting or running:
        while coming and coming[0].request.arrival <= len(steps):
            waiting.append(coming.popleft())
        preempted = decode(memory, running)
        waiting.extendleft(preempted)
        preemptions += len(preempted)
        while waiting and memory.write(waiting[0], bool(running)):
            running.append(waiting.popleft())
        steps.append(count_slots(memory, running, waiting))
        for live in running:
            live.tokens += 1
        for live in [live for live in running if live.written == live.request.kv_len]:
            running.remove(live)
            memory.free(live)
    return Replay(policy, memory.capacity, steps, preemptions)


def decode(memory: Memory, running: list[LiveRequest]) -> list[LiveRequest]:
    """Write one token of every running request. Returns the preempted ones, the last admitted first."""
    preempted: list[LiveRequest] = []
    for live in list(running):
        while live in running and not memory.write(live, True):
            victim = running.pop()
            memory.free(victim)
            preempted.append(victim)
    return preempted


def count_slots(memory: Memory, running: Sequence[LiveRequest], waiting: Sequence[LiveRequest]) -> StepUse:
    """Count the slots of each kind."""
    used = sum(live.written for live in running)
    to_come = sum(min(live.held, live.request.kv_len) for live in running) - used
    held = sum(live.held for live in running)
    external = memory.external(waiting[0]) if waiting else 0
    free = memory.capacity - held - external
    return StepUse(used, to_come, held - used - to_come, external, free, len(running), len(waiting))


# --- arithmetic ------------------------------------------------------------------------------------------------


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks for `num_tokens` tokens: 100 tokens take 7 blocks of 16."""
    return -(-num_tokens // block_size)


def region_waste(num_tokens: int, region: int) -> float:
    """The empty share of a region with `num_tokens` tokens in it: 100 tokens in 4096 leave 97.6 % empty."""
    if not 0 < num_tokens <= region:
        raise ValueError(f"num_tokens={num_tokens} is not valid; allowed: 1 to {region}, the region")
    return 1 - num_tokens / region


def paged_waste(num_tokens: int, block_size: int) -> float:
    """The empty share of the blocks of `num_tokens` tokens: 12 of 112 slots for 100 tokens in blocks of 16."""
    return region_waste(num_tokens, num_blocks(num_tokens, block_size) * block_size)


def mean_empty_slots(block_size: int) -> float:
    """Empty slots in a request's last block, (B - 1) / 2, if every length modulo B is equally likely."""
    return (block_size - 1) / 2


@dataclass(frozen=True)
class Capacity:
    """What fits into a budget of memory."""

    tokens: int
    blocks: int
    regions: int  # requests at once with one region each
    requests: int  # requests at once with blocks


def capacity_of(budget_bytes: int, bytes_per_token: int, region: int, block_size: int, num_tokens: int) -> Capacity:
    """How many requests of `num_tokens` tokens fit at once with a region of `region` tokens each, and with blocks.

    Llama-2-13B in 16 bits (26 GB) on a 40 GB card leaves about 12 GiB, at 800 KiB per token: 15,728 tokens, so 7
    regions of 2048 or 983 blocks of 16, and those hold 30 requests of 500 tokens.
    """
    tokens = budget_bytes // bytes_per_token
    blocks = tokens // block_size
    return Capacity(tokens, blocks, tokens // region, blocks // num_blocks(num_tokens, block_size))


def translate(address: int, page_size: int, table: Mapping[int, int] | Sequence[int]) -> int:
    """The physical address of a virtual one; or the slot of a token's position, given a block table.

    Address 10,000 with pages of 4096 is on page 2 at offset 1808; if page 2 is in frame 3, that is 14,096. Raises
    ValueError for a page that is not in the table (a page fault).
    """
    page, offset = divmod(address, page_size)
    frames = dict(enumerate(table)) if isinstance(table, Sequence) else table
    if page not in frames:
        raise ValueError(f"address={address} is on page {page}; allowed: pages {sorted(frames)}")
    return frames[page] * page_size + offset
