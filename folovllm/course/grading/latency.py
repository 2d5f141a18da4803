"""The real engine on a simulated machine: a formula gives the time of a step, so latencies are the same everywhere.

Scheduler, KV manager and engine are M4's. Three parts are replaced. The runner stores token ids where a model stores
K/V, and samples from all tokens that it reads back. The clock advances only by the cost of each step. A policy chooses
the requests of a step and their numbers of tokens::

    running, waiting -> policy.plan -> PlannedScheduler -> TokenRunner: tokens, and now += step_cost

So a policy can be tested against a latency target, with the same result on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from folovllm.config import EngineConfig, SchedulerConfig
from folovllm.course.grading.checks import WrongAnswer
from folovllm.engine.core import EngineCore
from folovllm.engine.factory import EngineParts
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.trace import StepTrace, Trace
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockPlan
from folovllm.math_utils import cdiv
from folovllm.messages import ModelRunnerOutput, SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.request import Request
from folovllm.runner.interface import ModelRunner
from folovllm.sampling_params import SamplingParams
from folovllm.scheduler.scheduler import Scheduler

VOCAB_SIZE = 256
BLOCK_SIZE = 64
MAX_STEPS = 1500  # a policy that needs more steps is assumed to starve a request
NANOSECONDS = 1_000_000_000  # of a second: the engine's clock counts seconds
MS = NANOSECONDS // 1000

Place = tuple[str, int, int]  # request id, tokens computed, tokens to compute


class Cost(NamedTuple):
    """Nanoseconds per step, per computed token, and per pair of a query and a visible key."""

    fixed: int
    per_token: int
    per_pair: int


class Policy(Protocol):
    """Chooses the requests of the next step, and their numbers of tokens."""

    def plan(self, running: Sequence[Place], waiting: Sequence[Place]) -> list[tuple[str, int]]:
        """(request id, tokens) per scheduled request. running: in order of admission; waiting: in order of arrival."""


@dataclass(frozen=True)
class Arrival:
    """A request that arrives at `time` (nanoseconds) with `prompt_len` tokens and generates `max_tokens`."""

    request_id: str
    time: int
    prompt_len: int
    max_tokens: int

    @property
    def prompt(self) -> list[int]:
        """Its prompt, derived from its id."""
        drawn = hashlib.shake_128(self.request_id.encode()).digest(self.prompt_len)
        return list(drawn)

    def expected_tokens(self) -> list[int]:
        """Its output by `next_token` on a plain list: the oracle of the run."""
        text = self.prompt
        for _ in range(self.max_tokens):
            text.append(next_token(text))
        return text[self.prompt_len :]


def step_cost(shares: Iterable[tuple[int, int]], cost: Cost) -> int:
    """Nanoseconds of a step that computes `count` tokens after `start` earlier ones, for each (start, count).

    Token i of a request sees i + 1 keys, itself included.
    """
    pairs = tokens = 0
    for start, count in shares:
        tokens += count
        pairs += count * start + count * (count + 1) // 2
    return cost.fixed + cost.per_token * tokens + cost.per_pair * pairs


def parts_of(step: StepTrace, cost: Cost) -> tuple[float, float, float]:
    """Milliseconds of a step: fixed, for its tokens, and for its query-key pairs."""
    shares = [(r.num_computed - r.num_scheduled, r.num_scheduled) for r in step.requests]
    tokens = cost.per_token * step.num_scheduled_tokens
    return cost.fixed / MS, tokens / MS, (step_cost(shares, cost) - cost.fixed - tokens) / MS


def next_token(tokens: Sequence[int]) -> int:
    """The token after `tokens`: a hash of all of them in order."""
    return hashlib.blake2b(bytes(tokens), digest_size=1).digest()[0]


class TokenRunner(ModelRunner):
    """Token ids in the slots of blocks, and a clock that advances by the cost of each step."""

    def __init__(self, num_blocks: int, cost: Cost) -> None:
        self.blocks = [[0] * BLOCK_SIZE for _ in range(num_blocks + 1)]
        self.cost = cost
        self.now = 0  # nanoseconds

    def clock(self) -> float:
        """Seconds, for the engine."""
        return self.now / NANOSECONDS

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Write every token of the step into its slot, advance the clock, and sample from the slots read back."""
        start = self.clock()
        if step.scheduled:
            self.now += step_cost(((share.start, share.num_tokens) for share in step.scheduled), self.cost)
        result = ModelRunnerOutput(forwards=int(bool(step.scheduled)))
        for share in step.scheduled:
            table = share.plan.block_table if isinstance(share.plan, BlockPlan) else ()
            for position, token in enumerate(share.token_ids, share.start):
                self.blocks[table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token
            sampled: list[int] = []
            if share.samples:
                end = share.start + share.num_tokens
                written = [token for block in table for token in self.blocks[block]][:end]
                sampled.append(next_token(written))
            result.sampled_token_ids.append(sampled)
            result.logprobs.append(None)
        end_time = self.clock()
        result.phases = {"prepare": (start, start), "forward": (start, end_time), "sample": (end_time, end_time)}
        return result


class PlannedScheduler(Scheduler):
    """The engine's scheduler, except that a policy chooses the requests and tokens of a step."""

    def __init__(self, policy: Policy, kv: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        super().__init__(kv, max_num_seqs, max_num_batched_tokens, chunked_prefill=True)
        self.chosen_by = policy
        self._planned = 0  # tokens of the request that is being scheduled

    def _num_new_tokens(self, num_tokens: int, step: SchedulerOutput) -> int:
        return min(num_tokens, self._planned)

    def schedule(self) -> SchedulerOutput:
        """The step that the policy plans. Raises WrongAnswer for a plan that is not valid."""
        step = SchedulerOutput()
        waiting = self.waiting.first(len(self.waiting))
        live = {request.request_id: request for request in (*self.running, *waiting)}
        if live:
            for request_id, count in checked_plan(self.chosen_by, self.running, waiting):
                self._planned = count
                self._put_in(live[request_id], step)
        step.finished_req_ids, self._finished_req_ids = self._finished_req_ids, []
        return step

    def _put_in(self, request: Request, step: SchedulerOutput) -> None:
        if request in self.running:
            plan = self.kv.allocate_slots(request, self._planned)
            if plan is None:
                raise RuntimeError("the pool is too small; this exercise needs one that holds all requests")
            self._schedule(request, plan, step)
            return
        self.waiting.remove_request(request)
        self.waiting.prepend_request(request)
        if not self._admit(request, step):
            raise RuntimeError("the pool is too small; this exercise needs one that holds all requests")


def place(request: Request) -> Place:
    """A request as a policy sees it."""
    return request.request_id, request.num_computed_tokens, request.num_tokens_to_compute


def checked_plan(policy: Policy, running: Sequence[Request], waiting: Sequence[Request]) -> list[tuple[str, int]]:
    """The policy's plan for a step. Raises WrongAnswer for a plan that is not valid."""
    seen = [place(r) for r in running], [place(r) for r in waiting]
    missing = {request_id: lacks for places in seen for request_id, _, lacks in places}
    plan: Any = policy.plan(*(list(places) for places in seen))
    shown = f"plan({', '.join(show_places(places) for places in seen)})\nreturned  {plan!r}"
    if not isinstance(plan, (list, tuple)) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in plan):
        raise WrongAnswer(f"{shown}\nIt must be a list of pairs (request id, tokens).")
    names = [name for name, _ in plan]
    if len(set(names)) < len(names):
        raise WrongAnswer(f"{shown}\nA request can be in a step only once.")
    for name, count in plan:
        if name not in missing:
            raise WrongAnswer(f"{shown}\nThere is no request {name!r}.")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= missing[name]:
            raise WrongAnswer(f"{shown}\n{name!r} has {missing[name]} tokens to compute; allowed: 1 to that many.")
    if not plan:
        raise WrongAnswer(f"{shown}\nThe step has no request, so the engine would never make progress.")
    return [(name, count) for name, count in plan]


def show_places(places: Sequence[Place]) -> str:
    """The first three places, and how many there are."""
    more = f", ... {len(places)} in total" if len(places) > 3 else ""
    return f"[{', '.join(map(repr, places[:3]))}{more}]"


@dataclass(frozen=True)
class Served:
    """The result of a run: outputs by id, with metrics in seconds of the simulated clock, and the trace."""

    outputs: dict[str, RequestOutput]
    trace: Trace

    def ttft(self, request_id: str) -> float:
        """Milliseconds from arrival to first token."""
        return 1e3 * (self.outputs[request_id].metrics.ttft or 0.0)

    def longest_itl(self, request_id: str | None = None) -> float:
        """The longest time between two tokens of a request, or of all requests if None, in milliseconds."""
        chosen = self.outputs.values() if request_id is None else [self.outputs[request_id]]
        return 1e3 * max((gap for output in chosen for gap in output.metrics.itls), default=0.0)


def serve(arrivals: Sequence[Arrival], cost: Cost, policy: Policy | None = None, budget: int = 2048) -> Served:
    """Run all requests to completion under a policy, or by the scheduler's own rule with a token budget.

    Raises WrongAnswer for a plan that is not valid and for a policy that starves a request.
    """
    longest = max(a.prompt_len + a.max_tokens for a in arrivals)
    num_blocks = 2 + sum(cdiv(a.prompt_len + a.max_tokens, BLOCK_SIZE) + 1 for a in arrivals)
    num_blocks += num_blocks // 50  # more than the watermark
    kv, runner = BlockManager(num_blocks, BLOCK_SIZE), TokenRunner(num_blocks, cost)
    most = len(arrivals)  # max_num_seqs
    scheduler: Scheduler
    if policy is None:
        scheduler = Scheduler(kv, most, budget, chunked_prefill=True)
    else:
        scheduler = PlannedScheduler(policy, kv, most, max(most, sum(a.prompt_len for a in arrivals)))
    core = EngineCore(scheduler, runner, clock=runner.clock)
    config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=most))
    engine = LLMEngine(engine_config=config, parts=EngineParts(core, None, (), VOCAB_SIZE, longest + 1))
    to_come = sorted(arrivals, key=lambda a: a.time)
    done: dict[str, RequestOutput] = {}
    while len(done) < len(arrivals):
        if not engine.has_unfinished_requests():
            runner.now = max(runner.now, to_come[0].time)
        while to_come and to_come[0].time <= runner.now:
            _add(engine, to_come.pop(0))
        done |= {output.request_id: output for output in engine.step() if output.finished}
        if len(engine.trace) >= MAX_STEPS:
            left = [a.request_id for a in arrivals if a.request_id not in done]
            raise WrongAnswer(f"After {MAX_STEPS} steps these are not done: {', '.join(left)}. Do they starve?")
    return Served(done, engine.trace)


def _add(engine: LLMEngine, arrival: Arrival) -> None:
    params = SamplingParams(temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True)
    submission = engine.prepare(arrival.request_id, arrival.prompt, params)
    seconds = arrival.time / NANOSECONDS  # earlier than now if it arrived during a step
    submission.user.metrics.arrival_time = seconds
    for request in submission.requests:
        request.arrival_time = seconds
    engine.submit([submission])


# --- the exercise's workload and targets ------------------------------------------------------------------

COST = Cost(fixed=20 * MS, per_token=50_000, per_pair=40)
READERS = tuple(Arrival(f"reader {i}", 0, 32, 96) for i in range(8))
LONG = Arrival("long", 300 * MS, 4096, 8)
SHORT = tuple(Arrival(f"short {i}", (450 + 130 * i) * MS, 64, 8) for i in range(5))
ITL_TARGET = 42 * MS  # of every request
LONG_TTFT_TARGET = 1200 * MS
SHORT_TTFT_TARGET = 100 * MS


class FixedBudget:
    """The scheduler's own rule as a policy: decodes first, then prompts in their order, within a token budget.

    long_prefill_token_threshold: maximum tokens of one request in a step, 0 for no limit.
    """

    def __init__(self, budget: int, long_prefill_token_threshold: int = 0) -> None:
        self.budget = budget
        self.long_prefill_token_threshold = long_prefill_token_threshold

    def plan(self, running: Sequence[Place], waiting: Sequence[Place]) -> list[tuple[str, int]]:
        """As in `Policy`."""
        left, step = self.budget, []
        for name, _, missing in (*sorted(running, key=lambda p: p[2] > 1), *waiting):
            count = min(missing, left, self.long_prefill_token_threshold or left)
            if count:
                step.append((name, count))
                left -= count
        return step
