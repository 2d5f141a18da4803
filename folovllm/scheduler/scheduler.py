"""Who runs in the next step, and how many tokens of it (vLLM: `vllm/v1/core/sched/scheduler.py`).

One scheduler for every milestone: `schedule()` decides a step, `update_from_output()` takes in what it sampled.

    waiting --admit--> running --check_stop--> finished
       ^                  |
       +-----preempt------+

Parallel sampling (n > 1) arrives as one leader and n - 1 children that name it as `parent_id` (`Forks`). Each starts as
a fork of the leader's first prompt_len - 1 tokens, computes the last one itself and samples with its own generator. A
leader that finishes first is *held*: its K/V stays in the books until its last child has forked or gone. A request may
also ask to be held (`Request.hold`): a beam search forks its next beams from it, and then lets it go. When room is
short, held K/V is given up before anybody has to give way, and whoever wanted to fork it computes its prompt alone.

A step takes every running request first, since somebody reads along; waiting ones join in the order of the queue with
what is left of the token budget. There is no prefill phase and no decode phase: each request computes those of its
known tokens that have no K/V yet (`num_tokens_to_compute`), as many as there is room for, and samples when it has
caught up. That is chunked prefill (Sarathi-Serve, Agrawal et al., OSDI 2024).

Without chunked prefill a prompt is computed in one piece, so the head of the line may not fit beside the decodes: then
it gets a step without them. No two such steps follow each other, so a decode skips one step at most.

Where prefixes are cached, a request starts with the blocks that it finds. If the block after those is one that a
running request is about to compute, it steps aside and follows that one (`Followers`) instead of computing it, too.

Where K/V comes in blocks, a running request may find none free. Then whoever came last (or has the lowest priority)
gives way: it loses its K/V, to be computed again, or has it swapped to the host, and goes back to the front of the
line. Its tokens are kept, so what it comes to say does not change. In such a step nobody is admitted.

Invariants (between two calls):
  1. Every live request is in exactly one of: parked, following, `waiting`, `running`. A held one is in none of them.
  2. len(running) <= max_num_running_reqs, and a step never holds more than max_num_batched_tokens tokens.
  3. Only running, held and swapped-out requests hold anything in the KV books, the last on the host.
  4. Nothing done in a step looks at all waiting requests.
"""

from __future__ import annotations

from collections.abc import Iterable

from folovllm.kv_cache.interface import KVCacheManager, KVFork, KVPlan
from folovllm.messages import EngineCoreOutput, ModelRunnerOutput, NewRequestData, ScheduledRequest, SchedulerOutput
from folovllm.request import Request, RequestStatus
from folovllm.scheduler.followers import Followers
from folovllm.scheduler.parallel_sampling import Forks
from folovllm.scheduler.request_queue import RequestQueue, create_request_queue
from folovllm.scheduler.stop import check_stop


class Scheduler:
    """Iteration-level scheduling under a limit of requests and a budget of tokens (Orca, Yu et al., OSDI 2022)."""

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
        # Tokens of one request in a step, so that others fit beside a long prompt; 0 for no such limit.
        self.long_prefill_token_threshold = long_prefill_token_threshold if chunked_prefill else 0
        # Every running request needs a token of the budget in every step, so more of them would have to take turns.
        self.max_num_running_reqs = min(max_num_seqs, max_num_batched_tokens)
        self.requests: dict[str, Request] = {}  # live and held
        self.waiting: RequestQueue = create_request_queue(policy)
        self.running: list[Request] = []
        self._decodes_skipped = False  # by the last step
        self._forks = Forks()
        self._followers = Followers()
        self._held: set[str] = set()  # finished requests whose K/V others still need
        self._finished_req_ids: list[str] = []  # for the next SchedulerOutput

    # ------------------------------------------------------------------ requests in

    def check_can_run(self, request: Request) -> None:
        """Raise ValueError, with the arithmetic, for a request that no step could ever run."""
        if request.num_prompt_tokens > self.max_num_batched_tokens and not self.chunked_prefill:
            raise ValueError(
                f"request {request.request_id!r}: the prompt has {request.num_prompt_tokens} tokens and a step "
                f"computes at most {self.max_num_batched_tokens}; allowed: a prompt of that length or less, or "
                "a larger max_num_batched_tokens, or enable_chunked_prefill"
            )
        reason = self.kv.why_never_fits(request)
        if reason is not None:
            raise ValueError(f"request {request.request_id!r} can never run: {reason}")

    def add_request(self, request: Request) -> None:
        """Take a new request. Raises ValueError if it can never run or its id is in use; nothing is changed then."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id={request.request_id!r} is in use; allowed: an id of no unfinished request")
        self.check_can_run(request)
        leader = self.requests.get(request.parent_id) if request.parent_id is not None else None
        held = request.parent_id in self._held
        if request.parent_id is not None and not held and (leader is None or leader.num_computed_tokens > 0):
            raise ValueError(f"parent_id={request.parent_id!r}; allowed: a request that is held or has not run yet")
        self.requests[request.request_id] = request
        if leader is None or held:
            self.waiting.add_request(request)
        if leader is not None:
            self._forks.add(leader.request_id, request, park=not held)

    def finish_requests(
        self, request_ids: Iterable[str], status: RequestStatus = RequestStatus.FINISHED_ABORTED
    ) -> list[str]:
        """Finish requests from outside and return their ids; those unknown or finished already are ignored."""
        ended = [i for i in request_ids if i in self.requests and not self.requests[i].is_finished]
        for request_id in ended:
            request = self.requests[request_id]
            request.set_status(status)
            self._remove(request)
        return ended

    def is_held(self, request_id: str) -> bool:
        """Whether the request has finished and its K/V can be forked."""
        return request_id in self._held

    def let_go(self, request_ids: Iterable[str]) -> None:
        """Requests that asked to be held need not be, once those that fork them have done so. Others are ignored."""
        for request_id in request_ids:
            if request_id in self._held:
                self.requests[request_id].hold = False
                self._release_if_unneeded(request_id)

    def undo_step(self, step: SchedulerOutput) -> list[str]:
        """The runner failed in `step`: abort its requests, and tell their end and all other news of it again.

        Their K/V may be half written, and to repeat the step on it could give wrong tokens. Returns the aborted ids.
        Nor is it known what reached the host of those that were swapped out: they will compute theirs again.
        """
        self._finished_req_ids[:0] = step.finished_req_ids
        for request in (self.requests[i] for i in step.preempted_req_ids if i in self.requests):
            self.waiting.remove_request(request)
            self._forget(request)
            self.waiting.prepend_request(request)
        for share in step.scheduled:  # nobody may fork what was to be moved, or found where this step was to write it
            if share.plan.ops or share.start == 0 or share.request_id in step.resumed_req_ids:
                self._forget(self.requests[share.request_id])
        # The last one first: a leader leaves its place at the front of the line to a child, so the first is then ahead.
        return self.finish_requests([share.request_id for share in reversed(step.scheduled)])

    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to compute."""
        return len(self.requests) > len(self._held)

    def has_news_for_runner(self) -> bool:
        """Whether a runner still holds something for requests that are gone."""
        return bool(self._finished_req_ids)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no K/V yet, parked children included."""
        return len(self.requests) - len(self.running) - len(self._held)

    # ------------------------------------------------------------------ one step

    def schedule(self) -> SchedulerOutput:
        """Decide the next step: running requests first, then as many waiting ones as room and budget allow."""
        step = SchedulerOutput()
        if self._head_needs_a_step_of_its_own():
            self._admit_waiting(step)
        self._decodes_skipped = bool(step.scheduled)
        if not step.scheduled:
            self._schedule_running(step)
            if not step.preempted_req_ids:
                self._admit_waiting(step)
        # Taken last: admitting its last child lets go of a held leader. A runner copies before it forgets.
        step.finished_req_ids, self._finished_req_ids = self._finished_req_ids, []
        return step

    def _head_needs_a_step_of_its_own(self) -> bool:
        """Whether only the budget that decodes take keeps the head of the line out, and decodes may skip this step."""
        seats = 0 < len(self.running) < self.max_num_running_reqs
        if self.chunked_prefill or self._decodes_skipped or not self.waiting or not seats:
            return False
        head = self.waiting.peek_request()
        one = head.status is RequestStatus.PREEMPTED or self._leader_to_fork(head) is not None
        num_new = 1 if one else head.num_tokens - self.kv.get_computed_blocks(head)
        # One token for each that runs: what those take beyond it who still catch up is no reason to skip a step.
        return num_new > self.max_num_batched_tokens - len(self.running)

    def _schedule_running(self, step: SchedulerOutput) -> None:
        """Decodes, then those that still catch up after a preemption, each with what the budget leaves."""
        for request in sorted(self.running, key=lambda r: r.num_tokens_to_compute > 1):
            num_new = self._piece(request.num_tokens_to_compute, step)
            if request.status is RequestStatus.RUNNING and num_new > 0:  # it may have given way to one before it
                plan = self._reserve(request, num_new, step)
                if plan is not None:
                    self._schedule(request, plan, step)

    def _piece(self, num_tokens: int, step: SchedulerOutput) -> int:
        """How many of a request's `num_tokens` tokens find room in the step."""
        room = self.max_num_batched_tokens - step.total_num_scheduled_tokens
        return min(num_tokens, room, self.long_prefill_token_threshold or room)

    def _reserve(self, request: Request, num_new: int, step: SchedulerOutput) -> KVPlan | None:
        """Room for a running request, at the cost of others if need be; None if it was itself the one to give way."""
        while (plan := self.kv.allocate_slots(request, num_new)) is None:
            if self._release_held():
                continue
            victim = self.running[-1]
            if self.policy == "priority":
                # Samples of one prompt are equal: then it is the last of them, too.
                victim = max(reversed(self.running), key=lambda r: (r.priority, r.arrival_time))
            self._preempt(victim, step)
            if victim is request:
                return None
        return plan

    def _preempt(self, victim: Request, step: SchedulerOutput) -> None:
        """Take a running request's K/V away, and its share of the step, and put it in front of those that wait."""
        ops = self.kv.swap_out(victim) if self.swaps else None
        if ops is None:
            self._forget(victim)
        else:
            step.kv_ops.extend(ops)
        step.remove(victim.request_id)
        step.preempted_req_ids.append(victim.request_id)
        self.running.remove(victim)
        victim.set_status(RequestStatus.PREEMPTED)
        self._wake(victim)
        self.waiting.prepend_request(victim)

    def _forget(self, request: Request) -> None:
        self.kv.free(request)
        request.num_computed_tokens = 0

    def _admit_waiting(self, step: SchedulerOutput) -> None:
        """Admit from the head of the line while there is room. Nobody overtakes a head that does not fit."""
        while self.waiting and len(self.running) < self.max_num_running_reqs:
            head = self.waiting.peek_request()
            if self._steps_aside(head) or self._admit(head, step):
                continue
            # If nothing runs, no room would ever come free: only finished leaders can be in the way.
            if self.running or not self._release_held() or not self._admit(head, step):
                break

    def _admit(self, request: Request, step: SchedulerOutput) -> bool:
        """Move the head of the line to `running` if its tokens fit the budget and the cache; else change nothing.

        Without chunked prefill a prompt has to fit in one piece. But a preempted request may catch up in several, since
        with its output it may be longer than any step.
        """
        first_time = request.status is RequestStatus.WAITING
        leader = self._leader_to_fork(request)
        fork = self.kv.fork(leader, request, request.num_prompt_tokens - 1) if leader is not None else KVFork(0)
        if fork is None:
            return False
        start = fork.num_tokens if leader is not None else self.kv.get_computed_blocks(request)
        missing = request.num_tokens - start
        num_new = self._piece(missing, step)
        fits = num_new > 0 and (num_new == missing or self.chunked_prefill or not first_time)
        plan = self.kv.allocate_slots(request, num_new, spare=bool(self.running)) if fits else None
        if plan is None:
            if leader is not None:
                self.kv.free(request)
            return False
        self.waiting.pop_request()
        if first_time:  # a preempted one is known to the runner: its state lives on
            request.num_cached_tokens = 0 if leader is not None else start
            params, stop_ids = request.sampling_params, request.stop_token_ids
            data = NewRequestData(request.request_id, request.prompt_token_ids, params, stop_ids)
            step.scheduled_new_reqs.append(data)
        else:
            step.resumed_req_ids.append(request.request_id)
        request.set_status(RequestStatus.RUNNING)
        request.num_computed_tokens = start
        self.running.append(request)
        step.kv_ops.extend(fork.ops)
        self._schedule(request, plan, step)
        self._fork_done(request)
        return True

    def _schedule(self, request: Request, plan: KVPlan, step: SchedulerOutput) -> None:
        """Add a request's share, as planned, to the step."""
        end = plan.start + plan.num_tokens
        samples = end == request.num_tokens
        step.add(ScheduledRequest(request.request_id, request.tokens(plan.start, end), plan.start, samples, plan))
        self._wake(request, end)

    def update_from_output(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Take in what `step` sampled: count K/V, append tokens, finish what is complete. One output per new token."""
        outputs: list[EngineCoreOutput] = []
        next_in_line: list[Request] = []
        for share, sampled, logprobs in zip(step.scheduled, result.sampled_token_ids, result.logprobs, strict=True):
            request = self.requests.get(share.request_id)
            if request is None or request.is_finished:
                continue  # aborted while the step was on its way
            self.kv.cache_blocks(share.plan)
            request.num_computed_tokens += share.num_tokens
            next_in_line += self._forks.unpark(request)
            if share.request_id in result.failed:
                request.stop_reason = result.failed[share.request_id]
                request.set_status(RequestStatus.FINISHED_ERROR)
                self._remove(request)
            num_new = 0
            for token in sampled:
                request.output_token_ids.append(token)
                num_new += 1
                if check_stop(request):
                    self._remove(request)
                    break
            if num_new or request.is_finished:
                outputs.append(
                    EngineCoreOutput(
                        request.request_id,
                        sampled[:num_new],
                        None if logprobs is None else logprobs[:num_new],
                        request.status.finish_reason,
                        request.stop_reason,
                        request.num_cached_tokens,
                        request.first_scheduled_time,
                    )
                )
        for child in reversed(next_in_line):
            self.waiting.prepend_request(child)
        return outputs

    # ------------------------------------------------------------------ requests out

    def _remove(self, request: Request) -> None:
        """Take a finished request out of every list, and its K/V out of the books unless children still need it."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove_request(request)
        elif request in self._followers:
            self._followers.remove(request)
        self._wake(request)
        self._fork_done(request)
        complete = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        if self._forks.has_parked(request.request_id):
            self.waiting.prepend_request(self._forks.promote(request))
        elif self._forks.due(request.request_id) or (request.hold and complete):
            self.kv.withdraw(request)
            self._held.add(request.request_id)  # `let_go`, or `_fork_done` of the last child, releases it
            return
        self._release(request)

    def _release(self, request: Request) -> None:
        self.kv.free(request)
        del self.requests[request.request_id]
        self._finished_req_ids.append(request.request_id)

    # ------------------------------------------------------------------ followers

    def _steps_aside(self, request: Request) -> bool:
        """Let the head of the line wait for a running request if that is about to compute its next block."""
        awaited = None if self._leader_to_fork(request) is not None else self.kv.awaited(request)
        if awaited is None:
            return False
        self.waiting.remove_request(request)
        self._followers.add(awaited.request_id, awaited.num_tokens, request)
        return True

    def _wake(self, leader: Request, num_tokens: int | None = None) -> None:
        """Who followed `leader` as far as `num_tokens`, or at all, is next in line: for this very step."""
        for follower in reversed(self._followers.wake(leader.request_id, num_tokens)):
            self.waiting.prepend_request(follower)

    # ------------------------------------------------------------------ forks

    def _leader_to_fork(self, request: Request) -> Request | None:
        """The leader whose K/V a child starts with; None for a request that starts alone.

        The last prompt token is never shared: its logits are what the child samples from first.
        """
        leader = self.requests.get(request.parent_id) if request.parent_id is not None else None
        num_shared = request.num_prompt_tokens - 1
        return leader if leader is not None and num_shared > 0 and self.kv.can_fork(leader, num_shared) else None

    def _release_held(self) -> bool:
        """Give up the K/V of all who are held; whoever would have forked it starts alone. Whether there was any."""
        held = list(self._held)
        for leader_id in held:
            self.requests[leader_id].hold = False
            for child_id in self._forks.due(leader_id):
                self._fork_done(self.requests[child_id])
            self._release_if_unneeded(leader_id)
        return bool(held)

    def _release_if_unneeded(self, leader_id: str) -> None:
        """Release a held request that nobody has reason to hold any longer."""
        if leader_id in self._held and not self._forks.due(leader_id) and not self.requests[leader_id].hold:
            self._held.remove(leader_id)
            self._release(self.requests[leader_id])

    def _fork_done(self, child: Request) -> None:
        """`child` needs its leader's K/V no more. Releases a held leader after the last one."""
        leader_id = self._forks.done(child)
        if leader_id is not None:
            self._release_if_unneeded(leader_id)
