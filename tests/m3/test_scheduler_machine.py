"""The scheduler over blocks, under everything that can happen to it in any order: what has to hold in every step.

Pools are so small that requests give way all the time, to be computed again or swapped out. Requests arrive with one
sample or several, are aborted, are held and forked and let go; whole steps fail before, while or after the runner has
done its work, and then what it was to write holds nothing. A step is looked at twice: when it has been scheduled,
against the rules written out, and when it is done, cell by cell.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from folovllm import SamplingParams
from folovllm.messages import SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.request import Request, RequestStatus
from tests.m3.helpers import check_all_free, check_kv_of_requests, manager_of
from tests.machines import MAX_MODEL_LEN, PagedMachine, Record, RunnerFailure
from tests.mock import VOCAB_SIZE, PagedMockRunner, mock_tokens, paged_mock_engine

USER_IDS = [f"r{i}" for i in range(7)]  # few, so that an id is used again after its request has gone


params_of_any_kind = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 3]),
    seed=st.integers(0, 3),
    max_tokens=st.sampled_from([4, 5, 9, 20, None]),
    min_tokens=st.integers(0, 4),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
)
prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=16)


class SchedulerMachine(PagedMachine):
    seen: ClassVar[Counter[str]] = Counter()  # over all examples: what really happened

    @initialize(
        policy=st.sampled_from(["fcfs", "priority", "sjf"]),
        mode=st.sampled_from(["recompute", "swap", "swap"]),
        max_num_seqs=st.sampled_from([1, 3, 5, 8]),
        budget=st.integers(2, 24),
        block_size=st.sampled_from([1, 2, 4, 8]),
        pool=st.integers(16, 64),
        host_share=st.sampled_from([0.3, 1, 2]),
        watermark=st.sampled_from([0, 0, 1, 3]),
    )
    def start(
        self,
        policy: str,
        mode: str,
        max_num_seqs: int,
        budget: int,
        block_size: int,
        pool: int,
        host_share: float,
        watermark: int,
    ) -> None:
        self.policy, self.budget, self.size = policy, budget, block_size
        self.limit = min(max_num_seqs, budget)
        blocks = pool // block_size
        host_blocks = int(blocks * host_share)
        self.engine = paged_mock_engine(
            max_num_seqs, budget, MAX_MODEL_LEN, blocks, block_size, host_blocks, policy, mode
        )
        self.scheduler, self.manager = self.engine.core.scheduler, manager_of(self.engine)
        self.manager.watermark = min(watermark, blocks - 1)  # a pool whose hundredth part is so much would be slow
        runner = self.engine.core.runner
        assert isinstance(runner, PagedMockRunner)
        self.watch(runner)
        self.skipped = False  # running requests, by the last step
        self.before: list[Request] = []
        self.in_queue: list[Request] = []
        self.free_before = 0

    # ------------------------------------------------------------------ what may happen

    @rule(wishes=st.lists(st.tuples(prompts, params_of_any_kind, st.integers(-1, 1)), min_size=1, max_size=4))
    def add(self, wishes: list[tuple[list[int], SamplingParams, int]]) -> None:
        for prompt, params, priority in wishes:
            free = [i for i in USER_IDS if i not in self.records]
            if free:
                self.submit(free[0], Record(prompt, params, priority if self.policy == "priority" else 0))

    @rule(token=st.integers(0, VOCAB_SIZE - 1), params=params_of_any_kind)
    def add_one_as_long_as_a_step(self, token: int, params: SamplingParams) -> None:
        """It cannot stand beside a decode."""
        free = [i for i in USER_IDS if i not in self.records]
        if free:
            self.submit(free[0], Record([token] * self.budget, params, 0))

    def submit(self, user_id: str, record: Record, parent: str | None = None) -> None:
        record.limit_to(self.manager.pool.num_blocks * self.size)
        prompt, longest = record.prompt, record.longest()
        blocks = -(-(longest - 1) // self.size)
        waiting = self.scheduler.num_waiting
        if len(prompt) > self.budget:
            message = f"the prompt has {len(prompt)} tokens and a step computes at most {self.budget}"
        elif blocks > self.manager.pool.num_blocks:
            message = f"may grow to {longest} tokens .* take {blocks} blocks of {self.size}, and the whole"
        else:
            made = self.engine.prepare(user_id, prompt, record.params, record.priority, parent, record.hold)
            self.engine.submit([made])
            self.records[user_id] = record
            assert self.scheduler.num_waiting == waiting + record.params.n
            return
        with pytest.raises(ValueError, match=message):
            self.engine.add_request(user_id, prompt, record.params, record.priority)
        assert self.scheduler.num_waiting == waiting
        self.seen["refused"] += 1

    @rule(prompt=prompts, max_tokens=st.integers(1, 3), last=st.integers(0, VOCAB_SIZE - 1), data=st.data())
    def add_one_to_hold(self, prompt: list[int], max_tokens: int, last: int, data: st.DataObject) -> None:
        """A request that stays when it has finished: a new one, or one that starts as a fork of one that stayed."""
        self.made += 1
        parent = data.draw(st.sampled_from([None, *self.held()]), "parent")
        if parent is not None:
            tokens = self.kept[parent]
            prompt = [*tokens[: data.draw(st.integers(1, len(tokens) - 1), "shared")], last]
        if len(prompt) >= MAX_MODEL_LEN:
            return
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.submit(f"h{self.made}", Record(prompt, params, 0, hold=True), parent)
        self.seen["child of a held one"] += parent is not None

    def abort(self, user_id: str) -> None:
        record = self.records[user_id]
        record.cut |= set(range(record.params.n))
        (output,) = self.engine.abort_request(user_id)
        assert output.finished
        self.take(output)
        unfinished = [r for r in self.scheduler.requests.values() if not r.is_finished]
        assert not any(r.request_id.split("/")[0] == user_id for r in unfinished)

    # ------------------------------------------------------------------ one step

    def step(self) -> None:
        self.look_before()
        self.in_order = False  # until the step is done
        try:
            outputs = self.engine.step()
        except RunnerFailure:
            assert not set(self.was_given) & {r.request_id for r in self.scheduler.running}
            outputs = []
        for output in outputs:
            self.take(output)
        self.in_order = True

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
            if record.hold:
                (sample,) = output.outputs
                assert (output.request_id in self.scheduler._held) == (sample.finish_reason in ("stop", "length"))
                self.kept[output.request_id] = [*record.prompt, *sample.token_ids]
            del self.records[output.request_id]
            for i in (output.request_id, *(f"{output.request_id}/{k}" for k in range(record.params.n))):
                self.runner.failing.discard(i)
                self.poisoned.discard(i)

    # ------------------------------------------------------------------ the rules, written out

    def rank(self, request: Request) -> float:
        """What the policy sorts those that wait by."""
        if self.policy == "priority":
            return request.priority
        most = request.num_prompt_tokens + (request.sampling_params.max_tokens or MAX_MODEL_LEN)
        left = min(most, request.max_model_len)
        return left - request.num_computed_tokens if self.policy == "sjf" else 0

    def blocks_needed(self, request: Request, num_tokens: int) -> int:
        """Free blocks that a running request takes for so many tokens more, a copy included."""
        table = self.manager.snapshot().tables.get(request.request_id, ())
        position = request.num_computed_tokens
        needed = -(-(position + num_tokens) // self.size) - len(table)
        if position // self.size < len(table) and self.manager.pool.ref_cnt[table[position // self.size]] > 1:
            needed += 1
        return max(0, needed)

    def forks(self, request: Request) -> bool:
        """Whether a waiting request starts with shared K/V of all its prompt but the last token."""
        return request.request_id in self.manager.snapshot().tables

    def idle_tables(self) -> list[tuple[int, ...]]:
        """Blocks that waiting forks and held requests name."""
        tables = self.manager.snapshot().tables
        return [tables[i] for i in (*self.scheduler._waiting_forks, *self.scheduler._held)]

    def look_before(self) -> None:
        """What the next step has to choose from."""
        self.before = list(self.scheduler.running)
        self.in_queue = [r for r in self.scheduler.requests.values() if r in self.scheduler.waiting]
        self.free_before = self.manager.pool.num_free
        self.forked_before = set(self.scheduler._waiting_forks)
        idle = Counter(block for table in self.idle_tables() for block in table)
        self.idle_alone = {block for block, count in idle.items() if self.manager.pool.ref_cnt[block] == count}
        self.needed_before = sum(self.blocks_needed(r, 1) for r in self.before)
        self.first_need = 0
        if self.scheduler.waiting:
            head = self.scheduler.waiting.peek_request()
            preempted = head.status is RequestStatus.PREEMPTED
            self.first_need = 1 if preempted or self.forks(head) else head.num_prompt_tokens
        self.to_compute = {r.request_id: r.num_tokens - r.num_computed_tokens for r in self.before}

    def check_plan(self, step: SchedulerOutput) -> None:
        shares = {share.request_id: share for share in step.scheduled}
        total = sum(len(share.token_ids) for share in step.scheduled)
        if not self.scheduler.has_unfinished_requests():
            assert not shares  # only to tell the runner what to forget
            return
        running = [r.request_id for r in self.scheduler.running]
        # Nobody twice, nobody beyond the limits, and always somebody.
        assert len(shares) == len(step.scheduled) > 0
        assert total == step.total_num_scheduled_tokens <= self.budget and len(running) <= self.limit
        assert set(shares) <= set(running)
        for share in step.scheduled:
            request = self.scheduler.requests[share.request_id]
            end = share.start + share.num_tokens
            assert share.start == request.num_computed_tokens and share.num_tokens > 0
            assert share.token_ids == (request.prompt_token_ids + request.output_token_ids)[share.start : end]
            assert share.samples == (end == request.num_tokens)
        freed = {i for i in self.forked_before if not (i in self.scheduler._waiting_forks or i in shares)}
        freed |= {i for i in self.forked_before if i in shares and shares[i].start == 0}
        self.seen["freed waiting forks"] += bool(freed)
        self.check_victims(step)
        self.check_running(step, shares, total)
        self.check_admitted(step, shares, total)

    def check_victims(self, step: SchedulerOutput) -> None:
        """Who came last gives way, or has the lowest priority; and only if room is short and nobody is held."""
        victims = list(self.before)
        if self.policy == "priority":
            victims.sort(key=lambda r: (r.priority, r.arrival_time))
        expected = [r.request_id for r in reversed(victims)]
        assert step.preempted_req_ids == expected[: len(step.preempted_req_ids)]
        if self.needed_before <= self.free_before and all(n == 1 for n in self.to_compute.values()):
            assert not step.preempted_req_ids
        if step.preempted_req_ids:
            assert not step.scheduled_new_reqs
            # What only idle requests held was freed first.
            assert not self.idle_alone & {block for table in self.idle_tables() for block in table}
            self.seen["preempted"] += 1
            self.seen["preempted two at once"] += len(step.preempted_req_ids) > 1
        for request_id in step.preempted_req_ids:
            request = self.scheduler.requests[request_id]
            assert request.status is RequestStatus.PREEMPTED and request in self.scheduler.waiting
            on_host = request_id in self.manager.snapshot().host_tables
            assert on_host == (request.num_computed_tokens > 0)
            self.seen["swapped out" if on_host else "to be computed again"] += 1

    def check_running(self, step: SchedulerOutput, shares: dict[str, Any], total: int) -> None:
        """Who runs goes on. All of them skip a step together, for a prompt that needs it, and never two in a row."""
        goes_on = [i for i in shares if i in self.to_compute]
        stay = [r.request_id for r in self.before if r.request_id not in step.preempted_req_ids]
        skips = bool(self.before) and not goes_on
        if skips:
            assert step.scheduled_new_reqs and not self.skipped and not step.preempted_req_ids
            assert self.first_need > self.budget - len(self.before)
            self.seen["skipped"] += 1
        else:
            assert [i for i in stay if self.to_compute[i] == 1] == [i for i in goes_on if self.to_compute[i] == 1]
            if not step.preempted_req_ids:
                wanted = sum(self.to_compute.values())
                assert sum(shares[i].num_tokens for i in goes_on) == min(self.budget, wanted)
        self.skipped = skips

    def check_admitted(self, step: SchedulerOutput, shares: dict[str, Any], total: int) -> None:
        """Whoever is admitted is next in line, and who is left out is left out for a reason."""
        admitted = [i for i in shares if i not in self.to_compute]
        new = {n.request_id for n in step.scheduled_new_reqs}
        assert new <= set(admitted)
        if step.preempted_req_ids:
            assert not admitted
            return
        rank = {r.request_id: self.rank(r) for r in self.in_queue}  # now: a fork that was freed has more to compute
        left_out = [rank[i] for i in rank if i not in admitted]
        assert [rank[i] for i in admitted] == sorted(rank[i] for i in admitted)
        assert not admitted or not left_out or rank[admitted[-1]] <= min(left_out)
        for i in admitted:
            request, end = self.scheduler.requests[i], shares[i].start + shares[i].num_tokens
            if i in new:
                assert end == request.num_prompt_tokens  # a prompt is computed in one step
                self.seen["forked"] += shares[i].start > 0
            else:
                assert end == request.num_tokens or total == self.budget
                self.seen["came back in pieces"] += end < request.num_tokens
                self.seen["came back from the host"] += shares[i].start > 0
        room = self.budget - total
        if not self.scheduler.waiting or len(self.scheduler.running) == self.limit or room == 0:
            return
        head = self.scheduler.waiting.peek_request()
        free = self.manager.pool.num_free - self.manager.watermark
        if head.status is RequestStatus.PREEMPTED:
            start = self.manager.get_computed_blocks(head)
            needed = -(-(start + min(head.num_tokens - start, room)) // self.size)
        elif self.forks(head):
            needed = self.blocks_needed(head, 1)
        else:
            needed = -(-head.num_prompt_tokens // self.size) if head.num_prompt_tokens <= room else 10**9
        assert needed > free
        self.seen["no room for the head of the line"] += needed < 10**9
        self.seen["kept out by the watermark"] += needed <= self.manager.pool.num_free

    # ------------------------------------------------------------------ between steps

    @invariant()
    def everyone_is_in_exactly_one_place(self) -> None:
        if not hasattr(self, "engine"):
            return
        requests = self.scheduler.requests.values()
        running = [r for r in requests if r.status is RequestStatus.RUNNING]
        waiting = [r for r in requests if r in self.scheduler.waiting]
        parked = [r for samples in self.scheduler._parked._by_leader.values() for r in samples]
        assert len(requests) == len(running) + len(parked) + len(waiting)
        for sample in parked:  # its leader has not computed the prompt, and will
            leader = self.scheduler.requests[str(sample.parent_id)]
            assert leader.num_computed_tokens < leader.num_prompt_tokens
            assert leader in running or leader in waiting
        assert {id(r) for r in self.scheduler.running} == {id(r) for r in running}
        assert len(self.scheduler.running) == len(running) <= self.limit
        assert all(r.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) for r in (*waiting, *parked))
        assert self.scheduler.num_waiting == len(waiting) + len(parked)
        for request in self.scheduler._held.values():
            assert request.hold and request.is_finished
        assert set(self.unfinished()) == {r.request_id for r in (*running, *parked, *waiting)}

    @invariant()
    def the_books_are_right_and_every_token_is_in_its_cell(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.manager.check()
        check_kv_of_requests(self.engine)

    def teardown(self) -> None:
        if not hasattr(self, "engine") or not self.in_order:
            return
        self.engine.core.scheduler.free_held(list(self.kept))
        for _ in range(2000):
            if not self.engine.has_unfinished_requests():
                break
            self.step()
            self.engine.core.scheduler.free_held(list(self.kept))
            self.everyone_is_in_exactly_one_place()
            self.the_books_are_right_and_every_token_is_in_its_cell()
        assert not self.records
        self.engine.core.abort_requests([])  # after a failed step nothing has told the runner of its end
        check_all_free(self.engine)


def test_the_rules_hold_in_every_step_and_everything_really_happened() -> None:
    SchedulerMachine.seen.clear()
    limits = settings(max_examples=250, stateful_step_count=25, deadline=None, derandomize=True)
    run_state_machine_as_test(SchedulerMachine, settings=limits)
    seen = {name for name, times in SchedulerMachine.seen.items() if times}
    assert seen >= {  # a step that fails with swaps in it is rare here; test_scheduler_paged.py has two of them
        "refused",
        "forked",
        "freed waiting forks",
        "child of a held one",
        "skipped",
        "preempted",
        "preempted two at once",
        "to be computed again",
        "swapped out",
        "came back in pieces",
        "came back from the host",
        "no room for the head of the line",
        "kept out by the watermark",
        "failed",
        "poisoned",
        "flaky",
    }
