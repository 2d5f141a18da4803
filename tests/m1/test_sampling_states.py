"""What is kept between steps, what is read late, and how much work a parameter costs (tensors are counted)."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from folovllm.kv_cache.interface import KVPlan
from folovllm.messages import ModelRunnerOutput, NewRequestData, ScheduledRequest, SchedulerOutput
from folovllm.outputs import Logprob
from folovllm.runner.sampling_states import SamplingStates
from folovllm.sampling import Sampler, SamplingBatch, SamplingState
from folovllm.sampling.logprobs import WholeVocabulary
from folovllm.sampling_params import SamplingParams
from tests.m1.sampling_reference import reference_noise, reference_probs, state
from tests.m1.test_sampler import LargeTensors

WIDE = 5_000


class Steps:
    """A runner's sampling states, and the steps of requests that decode."""

    def __init__(self, **requests: SamplingParams) -> None:
        self.states = SamplingStates(Sampler())
        self.lengths = {request_id: 3 for request_id in requests}
        news = [NewRequestData(i, [1, 2, 3], params, frozenset([0]), seed=5) for i, params in requests.items()]
        self.states.update(SchedulerOutput(scheduled_new_reqs=news))

    def sample(self, logits: torch.Tensor, *request_ids: str) -> ModelRunnerOutput:
        shares = []
        for i in request_ids:
            start = self.lengths[i] - 1 if self.lengths[i] > 3 else 0
            shares.append(ScheduledRequest(i, [0] * (self.lengths[i] - start), start, True, KVPlan(i, 0, 1)))
        return self.states.sample(shares, logits)


def test_a_repeated_step_changes_nothing() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.5, frequency_penalty=1.0, repetition_penalty=1.3, min_tokens=2)
    once, twice = Steps(a=params, b=SamplingParams()), Steps(a=params, b=SamplingParams())
    news = [NewRequestData("a", [1, 2, 3], params, frozenset([0]), seed=5)]
    for length in range(3, 12):
        once.lengths = twice.lengths = {"a": length, "b": length}
        twice.states.update(SchedulerOutput(scheduled_new_reqs=news))  # the runner failed before it sampled
        assert once.sample(logits, "a", "b") == twice.sample(logits, "a", "b")


def test_the_same_requests_are_selected_once() -> None:
    steps = Steps(a=SamplingParams(), b=SamplingParams(temperature=0))
    steps.sample(torch.zeros(2, 9), "a", "b")
    first = steps.states._selected[1]
    steps.lengths = {"a": 4, "b": 4}
    steps.sample(torch.zeros(2, 9), "a", "b")
    assert steps.states._selected[1] is first
    steps.sample(torch.zeros(2, 9), "b", "a")
    assert steps.states._selected[1] is not first


def test_rows_of_finished_requests_are_used_again() -> None:
    states, finished = SamplingStates(Sampler()), []
    for number in range(100):
        new = NewRequestData(str(number), [1], SamplingParams(presence_penalty=1.0), frozenset())
        states.update(SchedulerOutput(scheduled_new_reqs=[new], finished_req_ids=finished))
        share = ScheduledRequest(str(number), [1], 0, True, KVPlan(str(number), 0, 1))
        states.sample([share], torch.zeros(1, 9))
        finished = [str(number)]
    assert len(states) == 1 and states._batch is not None and len(states._batch.fields) == 8


def large_tensors(**kwargs: Any) -> list[str]:
    batch, logits = SamplingBatch("cpu", WIDE), torch.randn(8, WIDE)
    rows = batch.select([batch.add(SamplingState(SamplingParams(temperature=0, **kwargs), [3, 4])) for _ in range(8)])
    with LargeTensors(8 * WIDE) as mode:
        out = Sampler()(logits, rows, [0] * 8)
        if rows.penalties is not None:
            rows.penalties.counts.add(rows.penalties.slots, out.sampled)
    return mode.made


def test_a_penalty_makes_one_tensor_of_the_vocabularys_size() -> None:
    assert large_tensors() == []
    for kwargs in ({"repetition_penalty": 1.1}, {"frequency_penalty": 0.5}, {"logit_bias": {7: 1.0}}):
        made = [op for op in large_tensors(**kwargs) if "index_put_" not in op]  # in place, and sparse
        assert len(made) == 1, kwargs


FILTERS: list[dict[str, Any]] = [{"top_k": 20}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 50, "top_p": 0.9}, {}]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_filtered_rows_make_noise_for_the_tokens_that_are_left(fields: dict[str, Any]) -> None:
    batch = SamplingBatch("cpu", WIDE)
    logits = 3 * torch.randn(8, WIDE, generator=torch.Generator().manual_seed(0))
    rows = batch.select([batch.add(SamplingState(SamplingParams(**fields), [3], seed=s)) for s in range(8)])
    with LargeTensors(2 * WIDE) as mode:  # a word of noise is for two tokens: all rows' would be twice that
        Sampler()(logits, rows, [0] * 8)
    noise = [op for op in mode.made if "bitwise_xor" in op or "log1p" in op]
    assert bool(noise) == (not fields)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_a_filtered_draw_is_the_race_of_all_tokens(fields: dict[str, Any]) -> None:
    """By the formula in float64, beside rows with no filter, with few digits (ties), and rows that have no token."""
    batch, vocab_size = SamplingBatch("cpu", 60), 60
    table = (2 * torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(1))).bfloat16()
    table[7], table[9, 3] = -float("inf"), float("nan")
    asked = [SamplingParams(**fields if row % 3 else {}) for row in range(40)]
    rows = batch.select([batch.add(SamplingState(params, [3], seed=row)) for row, params in enumerate(asked)])
    found = Sampler()(table, rows, [row % 4 for row in range(40)])
    assert found.bad_rows == [7, 9]
    compared = 0
    for row, params in enumerate(asked):
        if row in found.bad_rows:
            continue
        probs, near = reference_probs(table[row].float().tolist(), state(params))
        noise = reference_noise(row, row % 4, vocab_size)
        compared += not near  # else float32 may see a filter's edge elsewhere
        assert near or found.token_ids[row] == max(range(vocab_size), key=lambda i: probs[i] / noise[i])
    assert compared > 25


def test_log_probabilities_make_few_tensors_of_the_vocabularys_size() -> None:
    def computed(**kwargs: Any) -> list[str]:
        views = ("to.", "detach", "view", "alias", "resolve_")  # of what is float32 and on the CPU already
        return [op for op in large_tensors(**kwargs) if not any(view in op for view in views)]

    assert computed(logprobs=20) == []
    assert computed(logprobs=-1) == ["aten.sub.Tensor"]


def test_the_whole_vocabulary_behaves_like_the_dict_it_was() -> None:
    values = np.array([-1.5, -0.25, -3.0, -0.25, -np.inf], np.float32)
    expected = {
        2: Logprob(-3.0, 4),
        1: Logprob(-0.25, 1),
        3: Logprob(-0.25, 2),
        0: Logprob(-1.5, 3),
        4: Logprob(-np.inf, 5),
    }
    entry = WholeVocabulary(2, values)
    assert entry.logprob(2) == -3.0 and len(entry) == 5 and entry._entries is None, "not read yet"
    copy = pickle.loads(pickle.dumps(entry))
    assert copy._entries is None and copy == entry == expected and expected == entry
    assert list(entry) == list(expected) and list(entry.items()) == list(expected.items())
    assert list(entry.values()) == list(expected.values()) and entry[3].rank == 2 and 5 not in entry
    assert entry != {**expected, 1: Logprob(0.0, 1)} and repr(entry) == repr(expected)
    entry = WholeVocabulary(2, values)
    entry.decode = lambda token_id: f"<{token_id}>"
    assert pickle.loads(pickle.dumps(entry))[3] == Logprob(-0.25, 2, "<3>")
