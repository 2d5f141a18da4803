"""What the state machines of M2, M3 and M4 share: a user's request, and how steps and samples come to an end.

A machine replaces two methods of its mock runner with `watched` and `watched_forward`, which fail when it says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from folovllm import LLMEngine, SamplingParams
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockCopy, BlockPlan, SwapIn, SwapOut
from folovllm.messages import ModelRunnerOutput, SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.scheduler.scheduler import Scheduler
from tests.mock import PagedMockRunner

MAX_MODEL_LEN = 32


class RunnerFailure(BaseException):
    """What a machine throws out of a step, as Ctrl-C is."""


@dataclass
class Record:
    """One request of a user. cut: samples that were ended from outside, so that only a part of each is there."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    hold: bool = field(default=False, kw_only=True)
    cut: set[int] = field(default_factory=set, kw_only=True)
    limit: int = field(default=MAX_MODEL_LEN, kw_only=True)

    def longest(self) -> int:
        """Tokens of prompt and output at most."""
        return min(len(self.prompt) + (self.params.max_tokens or MAX_MODEL_LEN), self.limit)

    def limit_to(self, capacity: int) -> None:
        """Without max_tokens the output ends where the cache does: the last token needs no K/V."""
        if self.params.max_tokens is None:
            self.limit = min(MAX_MODEL_LEN, max(capacity, len(self.prompt)) + 1)


class EngineMachine(RuleBasedStateMachine):
    """An engine with a mock runner, and the requests of its users."""

    engine: LLMEngine
    records: dict[str, Any]  # a `Record` by user request, of those that are not over

    def take(self, output: RequestOutput) -> None:
        """Look at an output."""
        raise TypeError(f"{type(self).__name__} does not say what is right")

    def end_one_sample(self, victim: str) -> None:
        """As a stop string does: one of several samples ends, its siblings go on."""
        self.cut(victim)
        user, sequence = self.engine._request_states[victim]
        self.engine.core.abort_requests([victim])
        sequence.abort()
        for output in self.engine._outputs([user], growing=()):
            self.take(output)

    def unfinished(self) -> list[str]:
        """The samples that go on."""
        return [s.request_id for _, s in self.engine._request_states.values() if s.finish_reason is None]

    def cut(self, sequence_id: str) -> None:
        user, sequence = self.engine._request_states[sequence_id]
        self.records[user.request_id].cut.add(sequence.index)


class PagedMachine(EngineMachine):
    """The same over blocks, where steps fail before, while or after the runner has done its work."""

    seen: ClassVar[Counter[str]]
    scheduler: Scheduler
    manager: BlockManager
    runner: PagedMockRunner
    size: int  # of a block

    def watch(self, runner: PagedMockRunner) -> None:
        """Begin without requests."""
        self.runner, self.execute, self.update = runner, runner.execute_model, runner.update_states
        runner.execute_model = self.watched_forward  # type: ignore[method-assign]
        runner.update_states = self.watched  # type: ignore[method-assign]
        self.records = {}
        self.kept: dict[str, list[int]] = {}  # requests that were held when they finished: their tokens
        self.made = 0
        self.failure = ""
        self.poisoned: set[str] = set()
        self.failing_call = 0
        self.calls = 0
        self.in_order = True

    def step(self) -> None:
        """One step."""
        raise TypeError(f"{type(self).__name__} does not step")

    def abort(self, user_id: str) -> None:
        """End a user's request."""
        raise TypeError(f"{type(self).__name__} does not abort")

    def check_plan(self, step: SchedulerOutput) -> None:
        """Look at a step that has been scheduled."""
        raise TypeError(f"{type(self).__name__} does not say what is right")

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.engine.core.scheduler.free_held([data.draw(st.sampled_from(self.held()), "held")])

    @rule(count=st.integers(1, 9))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.records)
    @rule(
        kind=st.sampled_from(["abort", "end one sample", "no token", "poison", "flaky", "before", "middle", "after"]),
        ops_done=st.integers(0, 4),
        data=st.data(),
    )
    def trouble(self, kind: str, ops_done: int, data: st.DataObject) -> None:
        """What ends requests before their time, and must touch no others."""
        if kind == "abort":
            self.abort(data.draw(st.sampled_from(sorted(self.records)), "victim"))
        elif kind == "end one sample" and self.unfinished():
            self.end_one_sample(data.draw(st.sampled_from(self.unfinished()), "victim"))
        elif kind == "no token" and self.scheduler.running:
            victim = data.draw(st.sampled_from(self.scheduler.running), "victim").request_id
            self.cut(victim)
            self.runner.failing.add(victim)
        elif kind == "poison" and self.scheduler.requests:
            victim = data.draw(st.sampled_from(sorted(self.scheduler.requests)), "victim")
            self.cut(victim)
            self.poisoned.add(victim)
        elif kind == "flaky":
            self.failing_call = ops_done  # of those of the next step; the 0th does not exist
            self.step()
            self.failing_call = 0
        elif kind in ("before", "middle", "after"):
            self.failure, self.ops_done = kind, ops_done
            self.step()
            self.failure = ""

    def watched(self, step: SchedulerOutput) -> None:
        """Stands in for the runner's `update_states`: the scheduler has decided, nothing is computed yet."""
        self.calls = 0
        if not step.scheduled:
            self.update(step)
            return
        self.check_plan(step)
        self.was_given = [share.request_id for share in step.scheduled]
        if self.failure:
            for share in step.scheduled:
                self.cut(share.request_id)
            swapped = any(isinstance(op, (SwapIn, SwapOut)) for op in step.kv_ops)
            self.seen["failed with swaps" if swapped else "failed"] += 1
            if self.failure != "after":
                self.half_execute(step, self.ops_done if self.failure == "middle" else 0)
                raise RunnerFailure
        self.update(step)

    def watched_forward(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Stands in for `execute_model`. It fails with a poisoned request, or once, with half of the slots written."""
        self.calls += 1
        victims = self.poisoned & {share.request_id for share in step.scheduled}
        if victims or self.calls == self.failing_call:
            self.scrub(step)
            self.seen["poisoned" if victims else "flaky"] += 1
            raise ValueError(f"cannot compute {sorted(victims)}")
        result = self.execute(step)
        if self.failure:
            raise RunnerFailure
        return result

    def half_execute(self, step: SchedulerOutput, ops_done: int) -> None:
        """Do the first operations, and leave nothing sensible where the others, and the tokens, were to go."""
        for op in step.kv_ops[:ops_done]:
            self.runner.apply(op)
        for op in step.kv_ops[ops_done:]:
            if isinstance(op, SwapOut):
                self.runner.host[op.host_block] = [None] * self.size
            else:
                assert isinstance(op, (BlockCopy, SwapIn))
                self.runner.device[op.dst if isinstance(op, BlockCopy) else op.block] = [None] * self.size
        self.scrub(step)

    def scrub(self, step: SchedulerOutput) -> None:
        for share in step.scheduled:
            assert isinstance(share.plan, BlockPlan)
            for position in range(share.start, share.start + share.num_tokens):
                self.runner.device[share.plan.block_table[position // self.size]][position % self.size] = None

    def held(self) -> list[str]:
        return [i for i in self.kept if i in self.scheduler._held]
