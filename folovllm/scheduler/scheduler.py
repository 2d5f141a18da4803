"""Which requests run in the next step, and how many tokens of each (vLLM: `vllm/v1/core/sched/scheduler.py`).

    waiting --admit--> running --check_stop--> finished
       ^                  |
       +-----preempt------+

Running requests come first in a step, because users wait for their next token; then waiting ones are admitted, with
what is left of the token budget. There is no prefill phase: a request computes its known tokens that have no K/V yet,
as many as the budget allows, and samples when it has caught up (chunked prefill: Sarathi-Serve, Agrawal et al., OSDI
2024). A prompt that must be computed at once may get a step without the decodes, but never two in a row.

Blocks are allocated as requests grow. If there is none for a running request, the last admitted one (or the one of
lowest priority) is preempted: its K/V is freed, to be computed again, or swapped to the host, and it goes to the front
of the queue. It keeps its tokens, so its output does not change. A step that preempts admits no request.

Where blocks can be shared, a request can start as a *fork*, with K/V of another one: samples fork the first sample of
their prompt (`parallel_sampling.py`), and beams a finished request that is *held*: it keeps its K/V until `free_held`.
The K/V of waiting forks and held requests is freed first when a running request needs a block.

Invariants (between two calls):
  1. An unfinished request is in exactly one of: `waiting`, `running`, parked (until its leader has the prompt's K/V).
  2. len(running) <= max_num_running_reqs, and a step has at most max_num_batched_tokens tokens.
  3. K/V is allocated to: running requests, held ones, waiting forks, and, on the host, swapped-out requests.
  4. No step visits all waiting requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from folovllm.kv_cache.interface import KVCacheManager, KVPlan
from folovllm.messages import EngineCoreOutput, ModelRunnerOutput, NewRequestData, ScheduledRequest, SchedulerOutput
from folovllm.request import Request, RequestStatus
from folovllm.scheduler.parallel_sampling import ParkedSamples
from folovllm.scheduler.request_queue import RequestQueue, create_request_queue
from folovllm.scheduler.stop import check_stop


class Scheduler:
    """Iteration-level scheduling with a limit of requests and a budget of tokens (Orca, Yu et al., OSDI 2022)."""

    def __init__(
        self,
        kv: KVCacheManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str = "fcfs",
        preemption_mode: str = "recompute",
        chunked_prefill: bool = False,
        long_prefill_token_threshold: int = 0,
    ) -> None:
        self.kv = kv
        self.policy = policy
        self.swaps = preemption_mode == "swap"
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunked_prefill = chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold if chunked_prefill else 0  # 0: no limit
        # A running request needs a token of the budget in every step, so more of them would have to take turns.
        self.max_num_running_reqs = min(max_num_seqs, max_num_batched_tokens)
        self.requests: dict[str, Request] = {}  # all unfinished ones
        self.waiting: RequestQueue = create_request_queue(policy)
        self.running: list[Request] = []
        self._parked = ParkedSamples()
        self._waiting_forks: dict[str, Request] = {}  # those in `waiting` that still share blocks
        self._held: dict[str, Request] = {}  # finished, with K/V
        self._decodes_skipped = False  # by the last step
        self._finished_req_ids: list[str] = []  # for the next SchedulerOutput

    def check_can_run(self, request: Request) -> None:
        """Raise ValueError, with the arithmetic, for a request that no step could ever run."""
        if request.num_prompt_tokens > self.max_num_batched_tokens and not self.chunked_prefill:
            raise ValueError(
                f"request {request.request_id!r}: the prompt has {request.num_prompt_tokens} tokens and a step "
                f"computes at most {self.max_num_batched_tokens}; allowed: a prompt of that length or less, or "
                "a larger max_num_batched_tokens, or enable_chunked_prefill"
            )
        if (reason := self.kv.why_never_fits(request)) is not None:
            raise ValueError(f"request {request.request_id!r} can never run: {reason}")

    def is_known(self, request_id: str) -> bool:
        """Whether this is the id of an unfinished request, or of a held one."""
        return request_id in self.requests or request_id in self._held

    def add_request(self, request: Request) -> None:
        """Take a request that `check_can_run` accepts. Raises ValueError, with nothing changed, for an id in use."""
        if self.is_known(request.request_id):
            raise ValueError(f"request_id={request.request_id!r} is in use; allowed: an id of no unfinished request")
        parent_id = request.parent_id if self.kv.can_share else None
        if parent_id in self.requests:
            self._parked.add(request)
        else:
            if parent_id in self._held:
                self._fork(self._held[parent_id], request)
            self.waiting.add_request(request)
        self.requests[request.request_id] = request

    def finish_requests(self, request_ids: Iterable[str], status: RequestStatus) -> list[str]:
        """Finish requests from outside and return their ids; unknown and finished ones are ignored."""
        finished = [i for i in dict.fromkeys(request_ids) if i in self.requests]
        for request_id in finished:
            self._finish(self.requests[request_id], status)
        return finished

    def undo_step(self, step: SchedulerOutput) -> list[str]:
        """`step` was left at any point: abort its requests, whose K/V may be half written, and return their ids.

        Requests that it preempted compute their K/V again: what was swapped out before is not known. Whatever was on
        its way from one place to another is aborted, too.
        """
        self._finished_req_ids[:0] = step.finished_req_ids
        for request in [self.requests[i] for i in step.preempted_req_ids if i in self.requests]:
            if request in self.waiting:
                self._drop_waiting_kv(request)
        # In reverse, so that samples that are promoted to the front of the queue keep the order of their leaders.
        aborted = [share.request_id for share in reversed(step.scheduled)]
        aborted += [*(new.request_id for new in step.scheduled_new_reqs), *step.resumed_req_ids]
        placed = {*map(id, self.running), *(id(r) for r in self.requests.values() if r in self.waiting)}
        lost = [i for i, r in self.requests.items() if id(r) not in placed and r not in self._parked]
        return self.finish_requests([*aborted, *lost], RequestStatus.FINISHED_ABORTED)

    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to compute."""
        return bool(self.requests)

    @property
    def num_waiting(self) -> int:
        """Unfinished requests that do not run, parked samples included."""
        return len(self.requests) - len(self.running)

    def schedule(self) -> SchedulerOutput:
        """Decide the next step: running requests first, then as many waiting ones as memory and budget allow."""
        step = SchedulerOutput()
        try:
            if self._first_needs_step_without_decodes():
                self._admit_waiting(step)
            self._decodes_skipped = bool(step.scheduled)
            if not step.scheduled:
                self._schedule_running(step)
                if not step.preempted_req_ids:
                    self._admit_waiting(step)
        except BaseException:  # an interrupt
            self.undo_step(step)
            raise
        step.finished_req_ids, self._finished_req_ids = self._finished_req_ids, []
        return step

    def _first_needs_step_without_decodes(self) -> bool:
        """Whether the first waiting request fits only without the decodes, a token each, which the last step had."""
        can_admit = self.waiting and 0 < len(self.running) < self.max_num_running_reqs
        if self.chunked_prefill or self._decodes_skipped or not can_admit:
            return False
        first = self.waiting.peek_request()
        if first.status is RequestStatus.PREEMPTED:  # it may catch up in chunks
            return False
        return first.num_tokens - self.kv.get_computed_blocks(first) > self.max_num_batched_tokens - len(self.running)

    def _schedule_running(self, step: SchedulerOutput) -> None:
        """Decodes, then requests that still compute their prompt or catch up after a preemption."""
        for request in sorted(self.running, key=lambda r: r.num_tokens_to_compute > 1):
            num_new = self._num_new_tokens(request.num_tokens_to_compute, step)
            if request.status is RequestStatus.RUNNING and num_new > 0:  # an earlier one may have preempted it
                plan = self._allocate_running(request, num_new, step)
                if plan is not None:
                    self._schedule(request, plan, step)

    def _admit_waiting(self, step: SchedulerOutput) -> None:
        """Admit from the front of the queue. No request overtakes a first one that does not fit."""
        while self.waiting and len(self.running) < self.max_num_running_reqs:
            first = self.waiting.peek_request()
            if not self._admit(first, step) and (self.running or not self._free_idle_kv(first)):
                break  # unless nothing runs, blocks will be freed by requests that finish

    def _admit(self, request: Request, step: SchedulerOutput) -> bool:
        """Move the first waiting request to `running` if the budget and the cache allow it; else change nothing."""
        start = self.kv.get_computed_blocks(request)  # tokens with K/V: found in the cache, forked, or swapped out
        missing = request.num_tokens - start
        num_new = self._num_new_tokens(missing, step)
        first_time = request.status is RequestStatus.WAITING
        # A preempted request may catch up in chunks: with its output it may be longer than any step.
        in_chunks = self.chunked_prefill or not first_time
        if num_new == 0 or (num_new < missing and not in_chunks):
            return False
        plan = self.kv.allocate_slots(request, num_new, spare=bool(self.running))
        if plan is None:
            return False
        self.waiting.pop_request()
        if first_time:
            forked = self._waiting_forks.pop(request.request_id, None)
            request.num_cached_tokens = start if forked is None else 0
            step.scheduled_new_reqs.append(NewRequestData.of(request))
        else:
            step.resumed_req_ids.append(request.request_id)
        request.num_computed_tokens = start
        request.set_status(RequestStatus.RUNNING)
        self.running.append(request)
        self._schedule(request, plan, step)
        return True

    def _num_new_tokens(self, num_tokens: int, step: SchedulerOutput) -> int:
        """How many of a request's `num_tokens` tokens this step computes: its chunk."""
        budget = self.max_num_batched_tokens - step.total_num_scheduled_tokens
        return min(num_tokens, budget, self.long_prefill_token_threshold or budget)

    def _schedule(self, request: Request, plan: KVPlan, step: SchedulerOutput) -> None:
        """Add a request's share, as planned, to the step."""
        end = plan.start + plan.num_tokens
        samples = end == request.num_tokens
        rows = request.prompt_rows(plan.start, end)
        step.add(ScheduledRequest(request.request_id, request.tokens(plan.start, end), plan.start, samples, plan, rows))

    def update_from_output(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Count K/V, append sampled tokens, finish what is complete. Returns an output per request with news."""
        outputs: list[EngineCoreOutput] = []
        forked: list[Request] = []
        for share, sampled, logprobs in zip(step.scheduled, result.sampled_token_ids, result.logprobs, strict=True):
            request = self.requests.get(share.request_id)
            if request is None:
                continue  # finished from outside since the step was scheduled
            if share.request_id not in result.not_written:
                self.kv.cache_blocks(share.plan)
                request.num_computed_tokens += share.num_tokens
            if share.prompt_rows:
                request.add_prompt_logprobs(share.prompt_rows, result.prompt_logprobs.get(share.request_id, ()))
            if request.num_computed_tokens >= request.num_prompt_tokens:  # fork before the leader may finish
                forked += [self._fork(request, sample) for sample in self._parked.pop(request.request_id)]
            before = request.num_output_tokens
            for token in sampled:
                request.output_token_ids.append(token)
                if status := check_stop(request):
                    self._finish(request, status)
                    break
            if share.request_id in result.failed:
                request.stop_reason = result.failed[share.request_id]
                self._finish(request, RequestStatus.FINISHED_ERROR)
            if (new := request.output_token_ids[before:]) or request.is_finished:
                outputs.append(EngineCoreOutput.of(request, new, logprobs))
        for sample in reversed(forked):
            self.waiting.prepend_request(sample)
        return outputs

    def _allocate_running(self, request: Request, num_new: int, step: SchedulerOutput) -> KVPlan | None:
        """Slots for a running request, at the cost of others if need be; None if it was itself preempted."""
        while (plan := self.kv.allocate_slots(request, num_new)) is None:
            if self._free_idle_kv(request):
                continue
            victim = self.running[-1]
            if self.policy == "priority":
                victim = max(reversed(self.running), key=lambda r: (r.priority, r.arrival_time))  # samples tie
            self._preempt(victim, step)
            if victim is request:
                return None
        return plan

    def recompute(self, request_ids: Sequence[str], step: SchedulerOutput) -> None:
        """Preempt requests of a step, which has run without them, and drop their K/V."""
        for request_id in reversed(request_ids):
            self._preempt(self.requests[request_id], step, swaps=False)

    def _preempt(self, victim: Request, step: SchedulerOutput, swaps: bool = True) -> None:
        """Take a running request's K/V and its share of the step, and put it at the front of the queue."""
        ops = self.kv.swap_out(victim) if self.swaps and swaps else None
        if ops is None:
            self.kv.free(victim)
            victim.num_computed_tokens = 0
        step.kv_ops.extend(ops or ())
        step.remove(victim.request_id)
        step.preempted_req_ids.append(victim.request_id)
        self.running.remove(victim)
        victim.set_status(RequestStatus.PREEMPTED)
        self.waiting.prepend_request(victim)

    def _free_idle_kv(self, request: Request) -> bool:
        """Free the K/V of a held request or a waiting fork, if that is what `request` lacks. False if it is not."""
        idle = [*self._waiting_forks.values(), *self._held.values()]
        if not self.kv.can_reclaim(idle, request):
            return False
        if idle[-1].is_finished:
            self.free_held([idle[-1].request_id])
        else:
            self._drop_waiting_kv(idle[-1])  # it will compute its whole prompt
        return True

    def _drop_waiting_kv(self, request: Request) -> None:
        self.kv.free(request)
        request.num_computed_tokens = 0
        self._waiting_forks.pop(request.request_id, None)
        self.waiting.update_rank(request)

    def _fork(self, parent: Request, child: Request) -> Request:
        """Let `child`, which is about to be queued, share `parent`'s K/V of its prompt. Returns `child`."""
        num_shared = child.num_prompt_tokens - 1  # it computes the last token, whose logits it samples from
        if num_shared > 0:
            self.kv.fork(parent, child, num_shared)
            child.num_computed_tokens = num_shared
            self._waiting_forks[child.request_id] = child
        return child

    def free_held(self, request_ids: Iterable[str]) -> None:
        """Free the K/V of held requests. Forks of them keep their share. Other ids are ignored."""
        for request in [self._held.pop(i) for i in request_ids if i in self._held]:
            self.kv.free(request)

    def _finish(self, request: Request, status: RequestStatus) -> None:
        """Give a request its final status, take it out of where it is, and free its K/V unless that is held.

        An interrupt at any line leaves it in `requests`, and `undo_step` finishes it again.
        """
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove_request(request)
        else:
            self._parked.remove(request)
        self._waiting_forks.pop(request.request_id, None)
        self._finished_req_ids.append(request.request_id)
        if not request.is_finished:
            request.set_status(status)
        if request.hold and self.kv.can_share and status.finish_reason in ("stop", "length"):
            self._held[request.request_id] = request
        else:
            self.kv.free(request)
        # Samples are still parked if a leader ends before its prompt is computed: the next one leads.
        if (next_leader := self._parked.promote(request.request_id)) is not None:
            self.waiting.prepend_request(next_leader)
        del self.requests[request.request_id]
