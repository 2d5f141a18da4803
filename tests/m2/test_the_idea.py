"""M2 in ten tests: what runs is decided anew at every step, so requests join and leave while others run.

A step computes the next token of every running request, and the whole prompt of each that joins, within a budget of
tokens. This file is what to read first. The others check it in depth: `test_same_tokens.py` the text;
`test_scheduler.py` and `test_request_queue.py` who runs when, `test_scheduler_machine.py` with random requests;
`test_padded.py` and `test_padded_cache.py` the batch; `test_usage.py` what the cache sets aside.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from folovllm import LLM, SamplingParams

PROMPTS = ["A KV cache", "Decoding is slow because", "Why", "A batch of requests", "The scheduler", "A block"]
LENGTHS = [4, 12, 3, 9, 2, 7]  # how many tokens each may say


def make_llm(milestone: str = "m2", **kwargs: Any) -> LLM:
    return LLM("folo-tiny", milestone=milestone, dtype="float32", device="cpu", **kwargs)


def params(max_tokens: int) -> SamplingParams:
    """Greedy, and as long as it is asked to be."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def serve(llm: LLM, prompts: list[Any] = PROMPTS, lengths: list[int] = LENGTHS) -> list[list[int]]:
    """All prompts at once: the tokens of each."""
    outputs = llm.generate(prompts, [params(n) for n in lengths], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def in_step(llm: LLM) -> list[list[str]]:
    """Who was in each step."""
    return [[request.request_id for request in step.requests] for step in llm.engine.trace]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What M1 says to each prompt, one after the other."""
    return serve(make_llm("m1"))


@pytest.mark.parametrize("batching", ["loop", "padded"])
def test_every_request_says_what_it_says_alone(batching: str, alone: list[list[int]]) -> None:
    assert serve(make_llm(batching=batching, max_num_seqs=4)) == alone


def test_a_request_joins_while_another_runs_and_leaves_when_it_is_done() -> None:
    llm = make_llm()
    llm.engine.add_request("long", PROMPTS[0], params(5))
    llm.engine.step()
    llm.engine.add_request("short", PROMPTS[1], params(2))
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert in_step(llm) == [["long"], ["long", "short"], ["long", "short"], ["long"], ["long"]]


def test_the_batch_is_full_as_long_as_requests_wait() -> None:
    llm = make_llm(max_num_seqs=3)
    serve(llm)
    for before, step in pairwise(llm.engine.trace):
        if before.num_waiting > 0:
            assert len(step.requests) == 3


def test_so_it_takes_fewer_steps_than_batches_that_wait_for_their_longest() -> None:
    llm = make_llm(max_num_seqs=3)
    serve(llm)
    assert llm.engine.stats.steps < max(LENGTHS[:3]) + max(LENGTHS[3:])


def test_a_step_never_holds_more_tokens_than_its_budget_or_more_requests_than_seats() -> None:
    llm = make_llm(max_num_seqs=4, max_num_batched_tokens=10)
    prompts = [[1] * 8, [2] * 5, [3] * 4, [4] * 1, [5] * 10, [6] * 2]
    serve(llm, prompts)
    assert all(len(step.requests) <= 4 and step.num_scheduled_tokens <= 10 for step in llm.engine.trace)
    assert {step.num_scheduled_tokens for step in llm.engine.trace} >= {10}  # and it is used


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abc"), ("priority", "cab"), ("sjf", "bca")])
def test_the_policy_says_who_is_next(policy: str, order: str) -> None:
    """First come, first served; the lowest priority value first; the fewest tokens left first."""
    llm = make_llm(max_num_seqs=1, scheduling_policy=policy)
    for name, prompt, priority in (("a", [5] * 9, 2), ("b", [5] * 2, 3), ("c", [5] * 4, 1)):
        llm.engine.add_request(name, prompt, params(1), priority=priority if policy == "priority" else 0)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert in_step(llm) == [[name] for name in order]


def test_the_loop_takes_a_forward_per_request_and_the_padded_batch_one_for_all() -> None:
    forwards = {}
    for batching in ("loop", "padded"):
        llm = make_llm(batching=batching)
        serve(llm, PROMPTS[:4], [5] * 4)
        forwards[batching] = llm.engine.stats.forwards
    assert forwards == {"loop": 4 * 5, "padded": 5}


def test_a_padded_batch_computes_padding_beside_a_long_prompt() -> None:
    llm = make_llm(batching="padded")
    serve(llm, [[5] * 20, [5] * 3, [5] * 8], [1] * 3)
    assert llm.engine.stats.padding_tokens == (20 - 3) + (20 - 8)


def test_a_request_sets_aside_as_much_as_it_could_ever_need() -> None:
    llm = make_llm(max_model_len=100)
    serve(llm, [[5] * 6, [5] * 3], [4, 4])
    first = llm.engine.trace[0].kv
    assert (first.reserved, first.used) == (2 * 100, 6 + 3)


def test_and_gives_it_back_when_it_ends() -> None:
    llm = make_llm(max_model_len=100)
    serve(llm, [[5] * 6, [5] * 3], [2, 4])
    assert [step.kv.reserved for step in llm.engine.trace] == [200, 100, 100, 0]
