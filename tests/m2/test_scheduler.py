"""The rules of a step by name: who is admitted, who waits, who goes, and what a policy costs."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from folovllm import LLMEngine, SamplingParams
from folovllm.request import Request
from tests.mock import check_empty, drain, first_scheduled, mock_engine, mock_tokens


def wishes(max_tokens: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kwargs)


def add(engine: LLMEngine, request_id: str, prompt: int, max_tokens: int, **kwargs: Any) -> None:
    """Queue a prompt of `prompt` tokens that only this request has."""
    priority = kwargs.pop("priority", 0)
    engine.add_request(request_id, [sum(map(ord, request_id)) % 64] * prompt, wishes(max_tokens, **kwargs), priority)


def shares(engine: LLMEngine) -> list[dict[str, int]]:
    """Per step: request id -> tokens computed."""
    return [{r.request_id: r.num_scheduled for r in step.requests} for step in engine.trace]


def last_step(engine: LLMEngine, request_id: str) -> int:
    return max(i for i, step in enumerate(shares(engine)) if request_id in step)


# ---------------------------------------------------------------------- joining and leaving


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8])
def test_first_scheduling_is_in_the_order_of_arrival(max_num_seqs: int) -> None:
    engine = mock_engine(max_num_seqs, budget=12, capacity=64 * 9)
    lengths = [5, 1, 12, 3, 7, 1, 1, 9, 2, 4]
    for i, length in enumerate(lengths[:6]):
        add(engine, str(i), length, 3 + i % 4)
    for i, length in enumerate(lengths[6:], 6):  # these come while others run
        engine.step()
        add(engine, str(i), length, 2)
    drain(engine)
    assert first_scheduled(engine) == [str(i) for i in range(10)]
    assert engine.stats.max_running == max_num_seqs


def test_nobody_overtakes_a_head_that_does_not_fit():
    """Step 2 has room for "small", and "long" is ahead of it: one step later both have begun."""
    engine = mock_engine(max_num_seqs=4, budget=8, capacity=256)
    add(engine, "runs", 1, 9)
    engine.step()
    add(engine, "first", 8, 9)
    add(engine, "long", 8, 9)
    add(engine, "small", 1, 9)
    for _ in range(4):
        engine.step()
    assert shares(engine)[1:] == [
        {"first": 8},
        {"runs": 1, "first": 1},
        {"long": 8},
        {"runs": 1, "first": 1, "long": 1, "small": 1},
    ]


def test_who_finishes_or_is_aborted_leaves_at_once_and_the_next_joins_in_the_next_step():
    engine = mock_engine(max_num_seqs=2, capacity=128)
    for request_id, max_tokens in (("a", 2), ("b", 9), ("c", 1), ("d", 9), ("e", 2)):
        add(engine, request_id, 3, max_tokens)
    engine.step()
    assert [r.request_id for r in engine.core.scheduler.running] == ["a", "b"]
    assert [o.request_id for o in engine.step() if o.finished] == ["a"]
    assert [r.request_id for r in engine.core.scheduler.running] == ["b"]
    assert engine.trace[-1].finished == ["a"] and engine.trace[-1].kv.reserved == 64
    engine.step()  # "c" has one token to give
    engine.step()
    engine.abort_request("b")
    assert [r.request_id for r in engine.core.scheduler.running] == ["d"]
    engine.step()
    assert shares(engine) == [{"a": 3, "b": 3}, {"a": 1, "b": 1}, {"b": 1, "c": 3}, {"b": 1, "d": 3}, {"d": 1, "e": 3}]
    assert engine.trace[-1].aborted == ["b"]
    drain(engine)
    check_empty(engine)


def test_a_slot_is_never_empty_while_somebody_waits():
    """Static batching of pairs would take 9 + 9 + 3 steps. Here both slots are full in all of 15."""
    engine = mock_engine(max_num_seqs=2, capacity=128)
    for request_id, max_tokens in (("a", 9), ("b", 3), ("c", 3), ("d", 9), ("e", 3), ("f", 3)):
        add(engine, request_id, 1, max_tokens)
    drain(engine)
    assert [len(step) for step in shares(engine)] == [2] * 15
    assert engine.stats.generated_tokens == 30


# ---------------------------------------------------------------------- the token budget


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_longer_than_the_budget_is_refused_with_both_numbers(n: int) -> None:
    engine = mock_engine(max_num_seqs=4, budget=8, capacity=256)
    add(engine, "runs", 2, 4)
    message = r"the prompt has 9 tokens and a step computes at most 8; allowed: .* larger max_num_batched_tokens"
    with pytest.raises(ValueError, match=message):
        add(engine, "long", 9, 4, n=n, seed=1)
    add(engine, "fits", 8, 4)
    assert list(drain(engine)) == ["runs", "fits"]
    check_empty(engine)


def test_a_prompt_that_does_not_fit_beside_the_decodes_gets_a_step_of_its_own():
    """And no two such steps follow each other: a running request skips one step at most."""
    engine = mock_engine(max_num_seqs=8, budget=16, capacity=64 * 9)
    add(engine, "runs", 1, 8)
    engine.step()
    for i in range(4):
        add(engine, f"long {i}", 16, 2)
    drain(engine)
    assert shares(engine) == [
        {"runs": 1},
        {"long 0": 16},
        {"runs": 1, "long 0": 1},
        {"long 1": 16},
        {"runs": 1, "long 1": 1},
        {"long 2": 16},
        {"runs": 1, "long 2": 1},
        {"long 3": 16},
        {"runs": 1, "long 3": 1},
        {"runs": 1},
        {"runs": 1},
        {"runs": 1},
    ]


def test_a_prompt_that_fits_beside_the_decodes_goes_along_with_them():
    engine = mock_engine(max_num_seqs=8, budget=16, capacity=64 * 9)
    add(engine, "runs", 1, 5)
    engine.step()
    add(engine, "a", 15, 3)
    add(engine, "b", 1, 3)
    engine.step()
    engine.step()
    assert shares(engine)[1:] == [{"runs": 1, "a": 15}, {"runs": 1, "a": 1, "b": 1}]


def test_a_step_of_its_own_takes_others_along_that_fit():
    engine = mock_engine(max_num_seqs=8, budget=16, capacity=64 * 9)
    for name in ("r", "s", "t", "u"):
        add(engine, name, 1, 9)
    engine.step()
    add(engine, "long", 13, 3)
    add(engine, "short", 3, 3)
    engine.step()
    assert shares(engine)[1] == {"long": 13, "short": 3}


def test_no_step_is_given_up_for_a_prompt_that_another_limit_keeps_out():
    """Where no slot or no K/V is free, the decodes go on: to skip them would help nobody."""
    for limits in ({"max_num_seqs": 2, "capacity": 64 * 9}, {"max_num_seqs": 8, "capacity": 64 * 2}):
        engine = mock_engine(budget=16, **limits)
        add(engine, "a", 1, 4)
        add(engine, "b", 1, 6)
        engine.step()
        add(engine, "long", 16, 2)
        drain(engine)
        both, one = {"a": 1, "b": 1}, {"b": 1}
        assert shares(engine) == [both, both, both, both, {"long": 16}, {"b": 1, "long": 1}, one]


def test_no_more_run_than_the_budget_has_tokens():
    """Each running request needs a token in each step, so `max_num_seqs` alone is no limit here."""
    engine = mock_engine(max_num_seqs=5, budget=3, capacity=64 * 9)
    for i in range(5):
        add(engine, str(i), 1, 4)
    drain(engine)
    assert engine.stats.max_running == 3
    assert [len(step) for step in shares(engine)] == [3, 3, 3, 3, 2, 2, 2, 2]


# ---------------------------------------------------------------------- the KV budget


def test_admission_is_limited_by_the_kv_budget():
    engine = mock_engine(max_num_seqs=8, max_model_len=32, capacity=3 * 32 + 31)
    for i in range(7):
        add(engine, str(i), 2, 3)
    done = drain(engine)
    assert engine.stats.max_running == 3
    assert [len(step) for step in shares(engine)] == [3, 3, 3, 3, 3, 3, 1, 1, 1]
    assert all(step.kv.reserved <= step.kv.capacity == 127 for step in engine.trace)
    assert done["6"][0] == [mock_tokens([ord("6")] * 2, wishes(3))[0]]
    check_empty(engine)


def test_a_running_request_reserves_as_much_as_it_may_ever_need():
    """From its first step on, whatever it has computed: so it never waits for room halfway."""
    engine = mock_engine(max_num_seqs=2, max_model_len=32, capacity=64)
    engine.add_request("as long as the model", [1, 2, 3], SamplingParams(max_tokens=None, ignore_eos=True))
    drain(engine)
    assert [step.kv.reserved for step in engine.trace] == [32] * 28 + [0]
    assert [step.kv.used for step in engine.trace] == [*range(3, 31), 0]


def test_a_cache_smaller_than_the_model_runs_what_fits_and_refuses_the_rest():
    engine = mock_engine(max_num_seqs=4, max_model_len=64, capacity=20)
    with pytest.raises(ValueError, match=r"may grow to 22 tokens \(9 of prompt and 13 of output\).*holds 20"):
        add(engine, "large", 9, 13)
    add(engine, "a", 9, 12)
    add(engine, "b", 9, 11)
    drain(engine)
    assert engine.stats.max_running == 1
    check_empty(engine)


# ---------------------------------------------------------------------- policies


def test_priority_serves_the_lowest_value_first_and_interrupts_nobody():
    engine = mock_engine(policy="priority")
    add(engine, "runs", 2, 4, priority=9)
    engine.step()
    for request_id, priority in (("late", 5), ("a", 1), ("b", 1), ("urgent", -3)):
        add(engine, request_id, 2, 2, priority=priority)
    engine.step()
    add(engine, "more urgent", 2, 2, priority=-4)
    drain(engine)
    assert first_scheduled(engine) == ["runs", "more urgent", "urgent", "a", "b", "late"]
    assert last_step(engine, "runs") == 3  # four steps for four tokens


def test_samples_of_one_prompt_share_its_priority():
    engine = mock_engine(max_num_seqs=1, capacity=256, policy="priority")
    add(engine, "a", 2, 2, n=3, seed=1, priority=1)
    add(engine, "b", 2, 2, priority=1)
    engine.step()
    add(engine, "urgent", 2, 2, priority=0)
    drain(engine)
    assert first_scheduled(engine) == ["a/0", "urgent", "a/1", "a/2", "b"]
    check_empty(engine)


def test_sjf_serves_the_fewest_tokens_first():
    engine = mock_engine(policy="sjf")
    add(engine, "runs", 2, 2)
    engine.step()
    for request_id, prompt, max_tokens in (("20", 10, 10), ("12", 2, 10), ("13", 12, 1), ("3", 1, 2), ("12b", 6, 6)):
        add(engine, request_id, prompt, max_tokens)
    drain(engine)
    assert first_scheduled(engine) == ["runs", "3", "12", "12b", "13", "20"]


def test_sjf_has_the_lowest_mean_time_to_finish_of_all_orders():
    """Every order of four jobs is tried, as priorities, one job at a time; the steps are counted."""
    jobs = {"a": (3, 9), "b": (2, 2), "c": (1, 5), "d": (4, 12)}  # as many steps as output tokens

    def mean_finish(policy: str, order: tuple[str, ...] = tuple(jobs)) -> float:
        engine = mock_engine(policy=policy)
        for request_id, (prompt, max_tokens) in jobs.items():
            priority = order.index(request_id) if policy == "priority" else 0
            add(engine, request_id, prompt, max_tokens, priority=priority)
        drain(engine)
        return sum(1 + last_step(engine, i) for i in jobs) / len(jobs)

    every = [mean_finish("priority", order) for order in permutations(jobs)]
    assert mean_finish("sjf") == min(every) == (2 + 7 + 16 + 28) / 4
    assert mean_finish("fcfs") == (9 + 11 + 16 + 28) / 4 > min(every)


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_sjf_lets_a_long_job_starve_while_short_ones_keep_coming(policy: str) -> None:
    """What SJF gains on average somebody pays for. First come, first served makes the long job wait for one other."""
    engine = mock_engine(policy=policy)
    add(engine, "short 0", 1, 2)
    engine.step()
    add(engine, "long", 20, 20)
    for i in range(1, 50):
        add(engine, f"short {i}", 1, 2)
        engine.step()
        engine.step()
    begun = "long" in first_scheduled(engine)
    assert begun == (policy == "fcfs")
    drain(engine)  # nobody comes any more
    assert first_scheduled(engine).index("long") == (1 if policy == "fcfs" else 50)
    check_empty(engine)


# ---------------------------------------------------------------------- what a step looks at


class WatchedRequest(Request):
    """Counts every look at any of its fields."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        WatchedRequest.looks += 1
        return super().__getattribute__(name)


def looks_per_step(policy: str, num_waiting: int) -> list[int]:
    engine = mock_engine(max_num_seqs=4, budget=16, capacity=64 * 5, policy=policy)
    for i in range(num_waiting):
        max_tokens = 3 if i < 10 else 4  # the first ten are first in line under each policy
        request = WatchedRequest(str(i), [i % 64] * 3, wishes(max_tokens), (), 64, arrival_time=float(i))
        engine.core.add_request(request)
    looks = []
    for _ in range(4):
        before = WatchedRequest.looks
        engine.core.step()
        looks.append(WatchedRequest.looks - before)
    engine.core.abort_requests(["9"])
    looks.append(WatchedRequest.looks - before - looks[-1])
    return looks


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_a_step_looks_at_as_many_requests_with_10_waiting_as_with_10_000(policy: str) -> None:
    """Steps that admit, steps that only decode, steps in which requests finish, and an abort from the middle."""
    few, many = looks_per_step(policy, 10), looks_per_step(policy, 10_000)
    assert len(few) == len(many) and all(looks > 0 for looks in few)
    # The record of a step names a handful of those who come next; with 10 waiting there may be fewer of them.
    assert all(abs(a - b) <= 5 for a, b in zip(few, many, strict=True))
