"""The scheduler under everything that can happen to it, in any order: what has to hold in every single step.

Requests arrive while others run, with one sample or several, under each policy and any limit. They are aborted, single
samples of them end, rows have no token to choose, and whole steps fail before or after the runner has written. A step
is looked at twice: when it has been scheduled, against the rules of the policy written out, and when it is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from folovllm import SamplingParams
from folovllm.messages import ModelRunnerOutput, SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.request import Request, RequestStatus
from tests.machines import MAX_MODEL_LEN, EngineMachine, Record, RunnerFailure
from tests.mock import VOCAB_SIZE, check_empty, mock_engine, mock_tokens

USER_IDS = [f"r{i}" for i in range(6)]  # few, so that an id is used again after its request has gone


@dataclass
class Arrival(Record):
    """The same, with its place in the order of arrivals."""

    arrival: int


class SchedulerMachine(EngineMachine):
    @initialize(
        policy=st.sampled_from(["fcfs", "priority", "sjf"]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(2, 24),
        capacity=st.one_of(st.integers(20, 3 * MAX_MODEL_LEN), st.just(10 * MAX_MODEL_LEN)),
    )
    def start(self, policy: str, max_num_seqs: int, budget: int, capacity: int) -> None:
        self.policy, self.budget, self.capacity = policy, budget, capacity
        self.limit = min(max_num_seqs, budget)
        self.engine = mock_engine(max_num_seqs, budget, MAX_MODEL_LEN, capacity, policy)
        self.scheduler, self.runner = self.engine.core.scheduler, self.engine.core.runner
        self.execute, self.update = self.runner.execute_model, self.runner.update_states
        self.runner.execute_model = self.watched_forward  # type: ignore[method-assign]
        self.runner.update_states = self.watched  # type: ignore[method-assign]
        self.records: dict[str, Arrival] = {}  # of user requests that are not over
        self.arrivals = 0
        self.failure = ""
        self.poisoned: set[str] = set()
        self.failing_call = 0
        self.calls = 0
        self.skipped = False  # running requests, by the last step
        self.before: list[Request] = []
        self.line: list[Request] = []
        self.first_need = 0

    # ------------------------------------------------------------------ what may happen

    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
        as_long_as_a_step=st.booleans(),
        params=st.builds(
            SamplingParams,
            n=st.sampled_from([1, 1, 2, 4]),
            seed=st.integers(0, 3),
            max_tokens=st.sampled_from([4, 5, 9, 20, None]),
            min_tokens=st.integers(0, 4),
            ignore_eos=st.booleans(),
            stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8),
        ),
        priority=st.integers(-1, 1),
    )
    def add(self, prompt: list[int], as_long_as_a_step: bool, params: SamplingParams, priority: int) -> None:
        if as_long_as_a_step:  # it cannot stand beside a decode
            prompt = (prompt * self.budget)[: self.budget]
        free = [i for i in USER_IDS if i not in self.records]
        if not free:
            return
        record = Arrival(prompt, params, priority if self.policy == "priority" else 0, self.arrivals)
        record.limit_to(min(self.capacity, MAX_MODEL_LEN))
        waiting = self.scheduler.num_waiting
        if len(prompt) > self.budget:
            message = f"the prompt has {len(prompt)} tokens and a step computes at most {self.budget}"
        elif record.longest() - 1 > self.capacity:
            message = f"it may grow to {record.longest()} tokens .*holds {self.capacity}"
        else:
            self.engine.add_request(free[0], prompt, params, record.priority)
            self.records[free[0]] = record
            self.arrivals += 1
            assert self.scheduler.num_waiting == waiting + params.n
            return
        with pytest.raises(ValueError, match=message):
            self.engine.add_request(free[0], prompt, params, record.priority)
        assert self.scheduler.num_waiting == waiting

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.records)
    @rule(
        kind=st.sampled_from(["abort", "end one sample", "no token", "poison", "flaky", "before", "after"]),
        data=st.data(),
    )
    def trouble(self, kind: str, data: st.DataObject) -> None:
        """What ends requests before their time, and must touch no others."""
        if kind == "abort":
            self.abort(data.draw(st.sampled_from(sorted(self.records)), "victim"))
        elif kind == "end one sample" and self.unfinished():
            self.end_one_sample(data.draw(st.sampled_from(self.unfinished()), "victim"))
        elif kind == "no token" and self.scheduler.running:
            victim = data.draw(st.sampled_from(self.scheduler.running), "victim").request_id
            self.cut(victim)
            self.runner.failing.add(victim)  # type: ignore[attr-defined]
        elif kind == "poison" and self.scheduler.requests:
            victim = data.draw(st.sampled_from(sorted(self.scheduler.requests)), "victim")
            self.cut(victim)
            self.poisoned.add(victim)
        elif kind == "flaky":
            self.failing_call = data.draw(st.integers(1, 4), "call")  # of those of the next step
            self.step()
            self.failing_call = 0
        elif kind in ("before", "after"):
            self.failure = kind  # the runner breaks, before it has listened or after it has written
            self.step()
            self.failure = ""

    def abort(self, user_id: str) -> None:
        record = self.records[user_id]
        record.cut |= set(range(record.params.n))
        (output,) = self.engine.abort_request(user_id)
        assert output.finished
        self.take(output)
        assert not any(i.split("/")[0] == user_id for i in self.scheduler.requests)

    # ------------------------------------------------------------------ one step

    def step(self) -> None:
        self.look_before()
        try:
            outputs = self.engine.step()
        except RunnerFailure:
            assert not set(self.runner_was_given) & {r.request_id for r in self.scheduler.running}
            outputs = []
        for output in outputs:
            self.take(output)

    def watched(self, step: SchedulerOutput) -> None:
        """Stands in for the runner's `update_states`: the scheduler has decided, nothing is computed yet."""
        self.calls = 0
        if not step.scheduled:
            self.update(step)
            return
        self.check_plan(step)
        self.runner_was_given = [share.request_id for share in step.scheduled]
        if self.failure:
            for share in step.scheduled:
                self.cut(share.request_id)
        if self.failure == "before":
            raise RunnerFailure
        self.update(step)

    def watched_forward(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Stands in for `execute_model`. It fails with a poisoned request, or once, before or after it has written."""
        self.calls += 1
        victims = self.poisoned & {share.request_id for share in step.scheduled}
        result = None if victims and self.calls % 2 else self.execute(step)
        if victims or self.calls == self.failing_call:
            raise ValueError(f"cannot compute {sorted(victims)}")
        if self.failure == "after":
            raise RunnerFailure
        assert result is not None
        return result

    def take(self, output: RequestOutput) -> None:
        """Every token is the one that the prompt and the tokens before it give, and the end is where it has to be."""
        record = self.records[output.request_id]
        for sample in output.outputs:
            whole, reason = mock_tokens(record.prompt, record.params.child(sample.index), record.limit)
            assert sample.token_ids == whole[: len(sample.token_ids)]
            if sample.index in record.cut:
                assert sample.finish_reason in (None, reason, "abort", "error")
            elif len(sample.token_ids) == len(whole):
                assert sample.finish_reason == reason
            else:
                assert sample.finish_reason is None
        assert output.finished == all(sample.finish_reason is not None for sample in output.outputs)
        if output.finished:
            del self.records[output.request_id]
            for i in (output.request_id, *(f"{output.request_id}/{k}" for k in range(record.params.n))):
                self.runner.failing.discard(i)  # type: ignore[attr-defined]
                self.poisoned.discard(i)

    # ------------------------------------------------------------------ the rules, written out

    def place(self, request: Request) -> tuple[int, int, int]:
        """Where the policy puts a request: its rank, then the arrival of the user's request, then the sample."""
        user, sequence = self.engine._request_states[request.request_id]
        record = self.records[user.request_id]
        rank = {"fcfs": 0, "priority": record.priority, "sjf": record.longest()}[self.policy]
        return rank, record.arrival, sequence.index

    def room(self) -> int:
        """Tokens of K/V that a running request sets aside."""
        return min(MAX_MODEL_LEN, self.capacity)

    def look_before(self) -> None:
        """What the next step has to choose from."""
        self.before = list(self.scheduler.running)
        waiting = [r for r in self.scheduler.requests.values() if r.status is RequestStatus.WAITING]
        self.line = sorted(waiting, key=self.place)
        self.first_need = self.line[0].num_prompt_tokens if self.line else 0

    def check_plan(self, step: SchedulerOutput) -> None:
        shares = {share.request_id: share for share in step.scheduled}
        running = [r.request_id for r in self.scheduler.running]
        total = sum(len(share.token_ids) for share in step.scheduled)
        if not self.scheduler.has_unfinished_requests():
            assert not shares  # only to tell the runner what to forget
            return
        # Nobody twice, nobody beyond the limits, and always somebody.
        assert len(shares) == len(step.scheduled) > 0
        assert total <= self.budget and len(running) <= self.limit
        assert set(shares) <= set(running)

        # Who is admitted is the head of the line: in order, and nobody overtakes one that does not fit.
        admitted = [new.request_id for new in step.scheduled_new_reqs]
        assert admitted == [r.request_id for r in self.line[: len(admitted)]]

        # Who runs goes on. All of them skip a step together, for a prompt that needs it, and never two in a row.
        goes_on = [i for i in shares if i not in admitted]
        skips = bool(self.before) and not goes_on
        assert skips or goes_on == [r.request_id for r in self.before]
        if skips:
            assert admitted and not self.skipped
            assert self.first_need + len(self.before) > self.budget

        # Who is left out is left out for a reason.
        usage = self.scheduler.kv.usage()
        left_out = self.line[len(admitted) :]
        if left_out and len(running) < self.limit and usage.reserved + self.room() <= self.capacity:
            assert left_out[0].num_prompt_tokens > self.budget - total
            assert admitted or self.skipped  # else it would have got a step of its own
        self.skipped = skips

        # A region for each that runs.
        assert usage.reserved == self.room() * len(running) <= self.capacity

    @invariant()
    def everyone_is_in_exactly_one_place(self) -> None:
        requests = self.scheduler.requests.values()
        running = [r for r in requests if r.status is RequestStatus.RUNNING]
        waiting = [r for r in requests if r.status is RequestStatus.WAITING]
        assert len(requests) == len(running) + len(waiting)
        assert {id(r) for r in self.scheduler.running} == {id(r) for r in running}
        assert len(self.scheduler.running) == len(running)
        assert [r for r in requests if r in self.scheduler.waiting] == waiting
        assert len(self.scheduler.waiting) == len(waiting)
        assert self.scheduler.num_waiting == len(waiting)
        assert set(self.unfinished()) == {r.request_id for r in (*running, *waiting)}

    @invariant()
    def the_books_say_what_was_computed(self) -> None:
        holders = self.scheduler.running
        usage = self.scheduler.kv.usage()
        assert usage.used == sum(r.num_computed_tokens for r in holders) <= usage.reserved
        assert usage.reserved == self.room() * len(holders) <= usage.capacity == self.capacity
        for request in holders:
            slots = self.runner.slots[request.request_id]  # type: ignore[attr-defined]
            assert slots == request.tokens(0, request.num_computed_tokens)

    def teardown(self) -> None:
        """Everything that is left comes to its end, and nothing of it stays behind."""
        if not hasattr(self, "engine"):
            return
        most = 2 + 2 * sum(MAX_MODEL_LEN * record.params.n for record in self.records.values())
        for _ in range(most):
            if self.engine.has_unfinished_requests():
                self.step()
        assert self.records == {}
        self.engine.abort_request([])  # after a failed step the runner hears of its end with the next call
        check_empty(self.engine)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
