"""Chunks, cached prefixes and forks under everything that can happen to them in any order.

Prompts begin alike, or go on where others have ended. Pools are so small that cached blocks are taken all the time and
requests give way, to be computed again or swapped out. Requests come with one sample or several, are aborted, held,
forked and let go; the cache is emptied; steps fail before, while or after the runner has done its work, and then what
it was to write holds nothing. The mock model notices any K/V that was computed after other tokens, so hash functions
that collide do no harm either.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

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
from folovllm.kv_cache.interface import SwapIn
from folovllm.kv_cache.prefix_cache import hash_block
from folovllm.messages import ScheduledRequest, SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.request import RequestStatus
from tests.m3.helpers import check_kv_of_requests, manager_of
from tests.m4.helpers import cached_engine, check_cache, check_nothing_is_left, colliding, runner_of
from tests.machines import MAX_MODEL_LEN, PagedMachine, Record, RunnerFailure
from tests.mock import VOCAB_SIZE, mock_tokens

USER_IDS = [f"r{i}" for i in range(9)]  # few, so that an id is used again after its request has gone
TEXTS = [[(7 * i + 3) % VOCAB_SIZE for i in range(MAX_MODEL_LEN)], [5] * MAX_MODEL_LEN]


@dataclass
class CacheRecord(Record):
    """The same, with a salt."""

    salt: str


params_of_any_kind = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 3]),
    seed=st.integers(0, 1),
    max_tokens=st.sampled_from([1, 4, 5, 9, 20, None]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)
# Which text, how much of it, how it goes on, and priority and salt.
wish = st.tuples(
    st.integers(0, 5),
    st.integers(0, MAX_MODEL_LEN),
    st.lists(st.integers(0, 2), max_size=3),
    params_of_any_kind,
    st.integers(-1, 1),
    st.sampled_from(["", "", "", "salt"]),
)


class CacheMachine(PagedMachine):
    seen: ClassVar[Counter[str]] = Counter()  # over all examples: what really happened

    @initialize(
        policy=st.sampled_from(["fcfs", "fcfs", "priority", "sjf"]),
        mode=st.sampled_from(["recompute", "swap"]),
        max_num_seqs=st.sampled_from([1, 3, 5, 8]),
        chunked=st.sampled_from([True, True, True, False]),
        budget=st.integers(1, 24),
        threshold=st.sampled_from([0, 0, 1, 3, 8]),
        block_size=st.sampled_from([1, 2, 4, 8]),
        pool=st.integers(16, 80),
        host_share=st.sampled_from([0.3, 1, 2]),
        cache=st.sampled_from(["good", "good", "good", "colliding", "none"]),
        watermark=st.sampled_from([0, 0, 1]),
    )
    def start(
        self,
        policy: str,
        mode: str,
        max_num_seqs: int,
        chunked: bool,
        budget: int,
        threshold: int,
        block_size: int,
        pool: int,
        host_share: float,
        cache: str,
        watermark: int,
    ) -> None:
        self.policy, self.budget, self.size, self.chunked = policy, budget, block_size, chunked
        self.long_prefill_token_threshold = threshold if chunked and threshold else 10**9
        self.limit = min(max_num_seqs, budget)
        self.cache = cache
        blocks = pool // block_size
        self.engine = cached_engine(
            blocks,
            block_size,
            int(blocks * host_share),
            caching=cache != "none",
            hash_function=colliding if cache == "colliding" else hash_block,
            chunked_prefill=chunked,
            max_num_seqs=max_num_seqs,
            budget=budget,
            max_model_len=MAX_MODEL_LEN,
            policy=policy,
            preemption_mode=mode,
            long_prefill_token_threshold=threshold,
        )
        self.scheduler, self.manager = self.engine.core.scheduler, manager_of(self.engine)
        self.manager.watermark = min(watermark, blocks - 1)  # a pool whose hundredth part is so much would be slow
        self.watch(runner_of(self.engine))
        self.texts = [list(text) for text in TEXTS]

    # ------------------------------------------------------------------ what may happen

    @rule(wishes=st.lists(wish, min_size=1, max_size=4))
    def add(self, wishes: list[tuple[int, int, list[int], SamplingParams, int, str]]) -> None:
        for which, cut, rest, params, priority, salt in wishes:
            free = [i for i in USER_IDS if i not in self.records]
            prompt = [*self.texts[-1 - which % len(self.texts)][:cut], *rest][: MAX_MODEL_LEN - 1]
            if free and prompt:
                self.submit(free[0], CacheRecord(prompt, params, priority if self.policy == "priority" else 0, salt))

    @rule(text=st.integers(0, 5), count=st.integers(2, 5), cut=st.integers(8, 24), params=params_of_any_kind)
    def add_some_that_begin_alike(self, text: int, count: int, cut: int, params: SamplingParams) -> None:
        for i in range(count):
            free = [j for j in USER_IDS if j not in self.records]
            if free:
                self.submit(free[0], CacheRecord([*self.texts[text % len(self.texts)][:cut], i], params, 0, ""))

    def submit(self, user_id: str, record: CacheRecord, parent: str | None = None) -> None:
        record.limit_to(self.manager.pool.num_blocks * self.size)
        longest, waiting = record.longest(), self.scheduler.num_waiting
        blocks = -(-(longest - 1) // self.size)
        prompt = {"prompt_token_ids": record.prompt, "cache_salt": record.salt}
        if len(record.prompt) > self.budget and not self.chunked:
            message = f"the prompt has {len(record.prompt)} tokens and a step computes at most {self.budget}"
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

    @rule(cut=st.integers(1, 20), max_tokens=st.integers(1, 3), last=st.integers(0, VOCAB_SIZE - 1), data=st.data())
    def add_one_to_hold(self, cut: int, max_tokens: int, last: int, data: st.DataObject) -> None:
        """A request that stays when it has finished: a new one, or one that starts as a fork of one that stayed."""
        self.made += 1
        parent, prompt = data.draw(st.sampled_from([None, *self.held()]), "parent"), self.texts[0][:cut]
        if parent is not None:
            tokens = self.kept[parent]
            prompt = [*tokens[: data.draw(st.integers(1, len(tokens) - 1), "shared")], last]
        if len(prompt) >= MAX_MODEL_LEN:
            return
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.submit(f"h{self.made}", CacheRecord(prompt, params, 0, "", hold=True), parent)
        self.seen["child of a held one"] += parent is not None

    @rule(really=st.sampled_from([False, False, True]))
    def reset(self, really: bool) -> None:
        if really:
            self.seen["reset while some run"] += bool(self.scheduler.running)
            self.manager.reset_prefix_cache()
            assert self.manager.snapshot().cached == {}

    def abort(self, user_id: str) -> None:
        record = self.records[user_id]
        record.cut |= set(range(record.params.n))
        (output,) = self.engine.abort_request(user_id)
        assert output.finished
        self.take(output)

    # ------------------------------------------------------------------ one step

    def step(self) -> None:
        self.before = list(self.scheduler.running)
        self.to_compute = {r.request_id: r.num_tokens_to_compute for r in self.before}
        self.preempted = {r.request_id for r in self.scheduler.requests.values() if r.status is RequestStatus.PREEMPTED}
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
        assert output.num_cached_tokens % self.size == 0 and output.num_cached_tokens < len(record.prompt)
        if output.finished:
            if record.hold:
                (sample,) = output.outputs
                assert (output.request_id in self.scheduler._held) == (sample.finish_reason in ("stop", "length"))
                self.kept[output.request_id] = [*record.prompt, *sample.token_ids]
            self.texts = [*self.texts, [*record.prompt, *output.outputs[-1].token_ids]][-6:]
            del self.records[output.request_id]
            for i in (output.request_id, *(f"{output.request_id}/{k}" for k in range(record.params.n))):
                self.runner.failing.discard(i)
                self.poisoned.discard(i)

    # ------------------------------------------------------------------ the rules, written out

    def check_plan(self, step: SchedulerOutput) -> None:
        if not self.scheduler.has_unfinished_requests():
            assert not step.scheduled  # a step that only tells the runner what to forget
            return
        shares = {share.request_id: share for share in step.scheduled}
        total = sum(share.num_tokens for share in step.scheduled)
        # Nobody twice, nobody beyond the limits, and always somebody.
        assert len(shares) == len(step.scheduled) > 0
        assert total == step.total_num_scheduled_tokens <= self.budget
        assert len(self.scheduler.running) <= self.limit
        assert set(shares) <= {r.request_id for r in self.scheduler.running}
        for share in step.scheduled:
            request = self.scheduler.requests[share.request_id]
            end = share.start + share.num_tokens
            assert share.start == request.num_computed_tokens and share.num_tokens > 0
            assert share.token_ids == request.tokens(share.start, end)
            assert share.samples == (end == request.num_tokens)
            assert share.num_tokens <= self.long_prefill_token_threshold
            self.seen["chunk"] += not share.samples
        assert not step.preempted_req_ids or not self.admitted(step)
        self.seen["preempted"] += bool(step.preempted_req_ids)
        self.check_running(step, shares)
        self.check_admitted(step, self.budget - total)
        self.look_at_hits(step)

    def admitted(self, step: SchedulerOutput) -> list[ScheduledRequest]:
        return [share for share in step.scheduled if share.request_id not in self.to_compute]

    def check_running(self, step: SchedulerOutput, shares: dict[str, ScheduledRequest]) -> None:
        """Decodes first, then those that catch up, each with as much as there is; only then is anybody admitted."""
        stay = [r.request_id for r in self.before if r.request_id not in step.preempted_req_ids]
        if stay and not set(stay) & set(shares):
            assert not self.chunked and step.scheduled_new_reqs  # a prompt that cannot be split has a step of its own
            self.seen["skipped"] += 1
            return
        order = [i for i in stay if self.to_compute[i] == 1] + [i for i in stay if self.to_compute[i] > 1]
        assert list(shares)[: len(order)] == [i for i in order if i in shares]
        if step.preempted_req_ids:
            return  # who gave way may have had a share of the budget by then
        left = self.budget
        for i in order:
            piece = min(self.to_compute[i], left, self.long_prefill_token_threshold)
            assert (shares[i].num_tokens if i in shares else 0) == piece
            left -= piece
        assert left > 0 or not self.admitted(step)

    def check_admitted(self, step: SchedulerOutput, room: int) -> None:
        """Each gets as much as there is; and if there is room, the next in line lacks blocks."""
        new = {n.request_id for n in step.scheduled_new_reqs}
        left = room
        for share in reversed(self.admitted(step)):
            left += share.num_tokens
            request = self.scheduler.requests[share.request_id]
            assert share.num_tokens == min(request.num_tokens - share.start, left, self.long_prefill_token_threshold)
            assert self.chunked or share.samples or share.request_id not in new
            assert share.request_id in new or share.request_id in self.preempted
        full = len(self.scheduler.running) == self.limit
        if not self.scheduler.waiting or full or room == 0 or step.preempted_req_ids:
            return
        head = self.scheduler.waiting.peek_request()
        if head.request_id in self.scheduler._waiting_forks:
            return  # test_scheduler_machine.py of M3 has the arithmetic
        start = self.manager.get_computed_blocks(head)
        piece = min(head.num_tokens - start, room, self.long_prefill_token_threshold)
        if self.chunked or piece == head.num_tokens - start or head.status is RequestStatus.PREEMPTED:
            swapped = head.request_id in self.manager.snapshot().host_tables
            hits = [] if swapped else self.manager._hits(head)
            held = sum(self.manager.pool.ref_cnt[entry.block] > 0 for entry in hits)
            assert -(-(start + piece) // self.size) - held > self.manager.pool.num_free - self.manager.watermark
            self.seen["no room for the head of the line"] += 1

    def look_at_hits(self, step: SchedulerOutput) -> None:
        """Cached blocks are full ones, and leave something to compute. How did they come to be hit?"""
        written = {b for share in step.scheduled for b in self.written(share)}
        for share in self.admitted(step):
            request = self.scheduler.requests[share.request_id]
            host = any(isinstance(op, SwapIn) for op in share.plan.ops)
            if share.start == 0 or host or share.start % self.size or self.cache == "none":
                continue
            hits = share.plan.block_table[: share.start // self.size]  # type: ignore[attr-defined]
            self.seen["hit"] += 1
            self.seen["hit what is written in the same step"] += bool(written & set(hits))
            self.seen["hit its own output"] += share.start > request.num_prompt_tokens

    def written(self, share: ScheduledRequest) -> tuple[int, ...]:
        end = share.start + share.num_tokens
        return share.plan.block_table[share.start // self.size : -(-end // self.size)]  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ between steps

    @invariant()
    def everyone_is_in_exactly_one_place(self) -> None:
        if not hasattr(self, "engine"):
            return
        requests = self.scheduler.requests.values()
        running = [r for r in requests if r.status is RequestStatus.RUNNING]
        waiting = [r for r in requests if r in self.scheduler.waiting]
        parked = [r for samples in self.scheduler._parked._by_leader.values() for r in samples]
        assert len(requests) == sum(map(len, (running, parked, waiting)))
        assert {id(r) for r in self.scheduler.running} == {id(r) for r in running}
        assert len(self.scheduler.running) == len(running) <= self.limit
        assert self.scheduler.num_waiting == len(waiting) + len(parked)
        assert all(r.hold and r.is_finished for r in self.scheduler._held.values())
        assert set(self.unfinished()) == {r.request_id for r in (*running, *parked, *waiting)}

    @invariant()
    def the_books_are_right_and_every_token_is_in_its_cell(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.manager.check()
        check_cache(self.engine)
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
        check_nothing_is_left(self.engine)


def test_the_rules_hold_in_every_step_and_everything_really_happened() -> None:
    CacheMachine.seen.clear()
    limits = settings(max_examples=200, stateful_step_count=25, deadline=None, derandomize=True)
    run_state_machine_as_test(CacheMachine, settings=limits)
    seen = {name for name, times in CacheMachine.seen.items() if times}
    assert seen >= {
        "chunk",
        "hit",
        "hit what is written in the same step",
        "hit its own output",
        "preempted",
        "skipped",
        "reset while some run",
        "child of a held one",
        "no room for the head of the line",
        "failed",
        "poisoned",
        "flaky",
    }
