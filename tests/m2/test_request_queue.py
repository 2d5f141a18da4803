"""Each policy's line against a plain list, and the count of what an operation looks at."""

from __future__ import annotations

import gc
import math
import weakref
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from folovllm import SamplingParams
from folovllm.request import Request
from folovllm.scheduler.request_queue import RequestQueue, create_request_queue

MAX_MODEL_LEN = 32
POLICIES = ("fcfs", "priority", "sjf")


def make_request(
    request_id: str, prompt: int = 3, max_tokens: int | None = 5, arrival: float = 0.0, priority: int = 0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(request_id, [1] * prompt, params, (), MAX_MODEL_LEN, arrival_time=arrival, priority=priority)


def rank(policy: str, request: Request) -> tuple[float, ...]:
    """The order of a policy, written out."""
    if policy == "fcfs":
        return ()
    if policy == "priority":
        return (request.priority, request.arrival_time)
    prompt, wanted = len(request.prompt_token_ids), request.sampling_params.max_tokens
    output = MAX_MODEL_LEN - prompt if wanted is None else min(wanted, MAX_MODEL_LEN - prompt)
    return (prompt + output - request.num_computed_tokens, request.arrival_time)


class QueueMachine(RuleBasedStateMachine):
    """The reference is a list that a stable sort keeps in order: who is added stands behind its equals, who is
    prepended before them."""

    @initialize(policy=st.sampled_from(POLICIES))
    def start(self, policy: str) -> None:
        self.policy = policy
        self.queue = create_request_queue(policy)
        self.line: list[Request] = []
        self.gone: list[Request] = []
        self.most = self.made = 0

    def make(self, data: st.DataObject) -> Request:
        """A new request, or one that was in the line before. Few different values, so that there are many ties."""
        if self.gone and data.draw(st.booleans(), "again"):
            return self.gone.pop()
        self.made += 1
        request = make_request(
            str(self.made),
            data.draw(st.integers(1, 4), "prompt"),
            data.draw(st.sampled_from([1, 2, 5, MAX_MODEL_LEN, None]), "max_tokens"),
            data.draw(st.integers(0, 2), "arrival"),
            data.draw(st.integers(-1, 1), "priority"),
        )
        request.num_computed_tokens = data.draw(st.integers(0, request.num_tokens), "computed")
        return request

    def sort(self) -> None:
        self.line.sort(key=lambda request: rank(self.policy, request))
        self.most = max(self.most, len(self.line))

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        request = self.make(data)
        self.queue.add_request(request)
        self.line.append(request)
        self.sort()

    @rule(data=st.data())
    def prepend(self, data: st.DataObject) -> None:
        request = self.make(data)
        self.queue.prepend_request(request)
        self.line.insert(0, request)
        self.sort()

    @precondition(lambda self: self.line)
    @rule()
    def pop(self) -> None:
        request = self.line.pop(0)
        assert self.queue.pop_request() is request
        self.gone.append(request)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request = self.line.pop(data.draw(st.integers(0, len(self.line) - 1), "place"))
        self.queue.remove_request(request)
        self.gone.append(request)

    @rule(count=st.integers(0, 8))
    def first(self, count: int) -> None:
        assert self.queue.first(count) == self.line[:count]

    @precondition(lambda self: self.gone)
    @rule()
    def remove_one_that_is_not_in_it(self) -> None:
        with pytest.raises(KeyError):
            self.queue.remove_request(self.gone[-1])

    @precondition(lambda self: not self.line)
    @rule()
    def ask_an_empty_line(self) -> None:
        with pytest.raises(IndexError, match="peek"):
            self.queue.peek_request()
        with pytest.raises(IndexError, match="empty queue"):
            self.queue.pop_request()

    @invariant()
    def it_is_the_list(self) -> None:
        assert len(self.queue) == len(self.line) and bool(self.queue) == bool(self.line)
        assert all(request in self.queue for request in self.line)
        assert not any(request in self.queue for request in self.gone)
        if self.line:
            assert self.queue.peek_request() is self.line[0]

    @invariant()
    def gaps_never_outnumber_requests(self) -> None:
        assert len(self.queue._heap) <= 2 * len(self.line)

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            assert [self.queue.pop_request() for _ in range(len(self.line))] == self.line
            assert len(self.queue) == 0


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


def ids(queue) -> list[str]:
    return [queue.pop_request().request_id for _ in range(len(queue))]


def test_priority_serves_the_lowest_value_first_and_equals_by_arrival():
    queue = create_request_queue("priority")
    for request_id, priority, arrival in (("d", 1, 0), ("c", 0, 3), ("a", -5, 9), ("b", 0, 2), ("e", 1, 1)):
        queue.add_request(make_request(request_id, priority=priority, arrival=arrival))
    assert ids(queue) == ["a", "b", "c", "d", "e"]


def test_sjf_counts_prompt_and_output_and_what_the_model_has_room_for():
    queue = create_request_queue("sjf")
    queue.add_request(make_request("the whole model", prompt=2, max_tokens=None))  # 32 in all
    queue.add_request(make_request("long output", prompt=1, max_tokens=20))  # 21
    queue.add_request(make_request("long prompt", prompt=15, max_tokens=2))  # 17
    queue.add_request(make_request("later and equal", prompt=1, max_tokens=16, arrival=1.0))  # 17
    queue.add_request(make_request("short", prompt=3, max_tokens=3))  # 6
    half_done = make_request("half done", prompt=2, max_tokens=18)  # 20, of which 15 are computed
    half_done.num_computed_tokens = 15
    queue.add_request(half_done)
    expected = ["half done", "short", "long prompt", "later and equal", "long output", "the whole model"]
    assert ids(queue) == expected


def test_who_is_prepended_stands_before_equals_and_under_fcfs_before_everyone():
    first, second, better = make_request("1"), make_request("2"), make_request("better", priority=-1, max_tokens=1)
    orders = {}
    for policy in POLICIES:
        queue = create_request_queue(policy)
        queue.add_request(better)
        queue.add_request(second)
        queue.prepend_request(first)
        orders[policy] = ids(queue)
    assert orders == {
        "fcfs": ["1", "better", "2"],
        "priority": ["better", "1", "2"],
        "sjf": ["better", "1", "2"],
    }


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="scheduling_policy='lifo' is not valid; allowed: 'fcfs', 'priority', 'sjf'"):
        create_request_queue("lifo")


# ---------------------------------------------------------------------- what an operation looks at


class Counted:
    """A number that counts how often it is compared."""

    comparisons: ClassVar[int] = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __lt__(self, other: Counted) -> bool:
        Counted.comparisons += 1
        return self.value < other.value

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return isinstance(other, Counted) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def comparisons(work) -> int:
    before = Counted.comparisons
    work()
    return Counted.comparisons - before


def sorted_line(count: int) -> tuple[RequestQueue, list[Request]]:
    """`count` requests in a scrambled but fixed order, every priority once."""
    requests = [make_request(str(i), priority=i * 7919 % count) for i in range(count)]
    queue = RequestQueue(lambda request: (Counted(request.priority),))  # type: ignore[arg-type, return-value]
    for request in requests:
        queue.add_request(request)
    return queue, requests


@pytest.mark.parametrize("count", [16, 1024, 65_536])
def test_a_sorted_line_compares_no_more_than_its_heap_is_high(count: int) -> None:
    queue, requests = sorted_line(count)
    height = math.log2(count)
    # Each level of a heap costs at most two comparisons of places, and those look at a rank at most twice.
    limit = 4 * (height + 2)
    assert comparisons(queue.peek_request) == 0
    assert comparisons(lambda: requests[3] in queue) == 0
    assert comparisons(lambda: len(queue)) == 0
    assert comparisons(lambda: queue.remove_request(requests[3])) == 0
    for _ in range(5):
        assert 0 < comparisons(lambda: (queue.pop_request(), queue.peek_request())) <= limit
        assert 0 < comparisons(lambda: queue.add_request(requests[3])) <= limit
        queue.remove_request(requests[3])
        assert 0 < comparisons(lambda: queue.prepend_request(requests[3])) <= limit
        queue.remove_request(requests[3])
        assert 0 < comparisons(lambda: queue.first(3)) <= 3 * 2 * limit


def test_to_empty_a_sorted_line_from_the_middle_costs_n_log_n_in_all():
    count = 4096
    queue, requests = sorted_line(count)
    total = comparisons(lambda: [(queue.remove_request(r), len(queue) and queue.peek_request()) for r in requests])
    assert total <= 4 * count * (math.log2(count) + 2)
    assert len(queue) == 0


def test_gaps_stay_bounded_while_requests_come_and_go():
    """Nobody is ever served, so no gap comes to the front: without a rebuild the heap would hold 10,000 places."""
    queue = create_request_queue("priority")
    for i in range(3):
        queue.add_request(make_request(f"stays {i}", priority=-1))
    for i in range(10_000):
        request = make_request(str(i))
        queue.add_request(request)
        queue.remove_request(request)
        assert len(queue._heap) <= 6
    assert ids(queue) == ["stays 0", "stays 1", "stays 2"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_line_keeps_no_request_alive_that_has_left(policy: str) -> None:
    queue = create_request_queue(policy)
    queue.add_request(make_request("front", priority=-1, max_tokens=1))
    leaves = [make_request(str(i)) for i in range(2)]
    for request in leaves:
        queue.add_request(request)
    queue.remove_request(leaves[0])
    references = [weakref.ref(leaves[0])]
    queue.remove_request(leaves[1])
    references.append(weakref.ref(leaves[1]))
    del request
    leaves.clear()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert len(queue) == 1
