"""The sampler against the float64 reference, alone and in company, and at its edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.sampling import Sampler, SamplerOutput, SamplingBatch, SamplingState
from folovllm.sampling_params import SamplingParams
from tests.m1.sampling_reference import (
    INF,
    VOCAB,
    random_batch,
    random_state,
    reference_noise,
    reference_probs,
    sample,
    state,
    with_seeds,
)


def test_every_row_of_a_mixed_batch_is_the_references() -> None:
    # A seed's noise is known, so the token is argmax(p / noise): a draw tests every probability of its row.
    checked = unclear = 0
    for seed in range(40):
        logits, states = random_batch(seed, rows=25)
        token_ids = sample(logits, states).token_ids
        for row, s, token_id in zip(logits.double().tolist(), states, token_ids, strict=True):
            probs, near = reference_probs(row, s)
            noise = reference_noise(s.seed, len(s.output_token_ids), VOCAB)
            if s.params.temperature == 0:
                noise = [1.0] * VOCAB
            scores = [p / n for p, n in zip(probs, noise, strict=True)]
            best, second = sorted(scores, reverse=True)[:2]
            if near or second > best * (1 - 1e-4):
                unclear += 1
                continue
            assert token_id == scores.index(best)
            checked += 1
    assert checked + unclear == 1000
    assert unclear <= 10, "more rows than float32 explains lie on an edge"


def test_greedy_rows_see_every_edit_in_order() -> None:
    # Two logits around 0: the bias decides which side the repetition penalty takes them for.
    logits = torch.tensor([[1.0, -1.0, 0.92]])
    s = state(prompt=[0, 1], temperature=0, repetition_penalty=2.0, logit_bias={0: -1.5, 1: 2.9})
    # Bias first: (-1 + 2.9) / 2 = 0.95 > 0.92; penalty first: -1 * 2 + 2.9 = 0.9 < 0.92.
    assert sample(logits, [s]).token_ids == [1]
    # Repetition before frequency: 3 / 2 - 1 = 0.5, between 0.4 and 0.8; the other way round: (3 - 1) / 2 = 1.
    for third, expected in ((0.4, 0), (0.8, 2)):
        logits = torch.tensor([[3.0, -9.0, third]])
        s = state(output=[0], temperature=0, repetition_penalty=2.0, frequency_penalty=1.0)
        assert sample(logits, [s]).token_ids == [expected]


def test_a_bias_cannot_lift_a_ban() -> None:
    logits = torch.zeros(1, 4)
    s = state(temperature=0, min_tokens=1, stop=[2], logit_bias={2: 100.0, 3: 1.0})
    assert sample(logits, [s]).token_ids == [3]


def test_stop_tokens_are_free_from_min_tokens_on() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for length, expected in ((0, 2), (1, 2), (2, 1), (3, 1)):
        s = state(output=[0] * length, stop=[1], min_tokens=2, temperature=0)
        assert sample(logits, [s]).token_ids == [expected]


def test_the_argmax_takes_the_first_of_equals_as_hugging_face_does() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0], [1.0, 1.0, 0.0, 1.0]])
    assert sample(logits, [state(temperature=0)] * 2).token_ids == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_the_callers_logits_are_never_changed(seed: int, dtype: torch.dtype) -> None:
    logits, states = random_batch(seed, rows=12)
    logits = logits.to(dtype)
    before = logits.clone()
    sample(logits, states)
    assert torch.equal(logits, before)
    for s in states:  # alone, a row takes the paths without a gather
        sample(logits[:1], [s])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_float_type_is_sampled_as_its_float32_values(dtype: torch.dtype) -> None:
    for seed in range(4):
        logits, states = random_batch(seed, rows=12)
        logits = logits.to(dtype)
        ours = sample(logits, states)
        assert ours == sample(logits.float(), states)


def test_the_default_dtype_plays_no_part() -> None:
    # Model loaders change it. In bfloat16 this bias would be 1, and this min_p a half.
    biased = state(temperature=0, logit_bias={1: 1.001})
    filtered = state(min_p=0.5001)
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = torch.tensor([[1.0005, 0.0]], dtype=torch.float32)
        assert sample(logits, [biased]).token_ids == [1]
        logits = torch.tensor([0.0, math.log(0.50005)], dtype=torch.float32).expand(50, -1)
        assert sample(logits, [filtered] * 50).token_ids == [0] * 50
    finally:
        torch.set_default_dtype(torch.float32)


def test_float64_ties_in_float32_do_not_depend_on_the_neighbours() -> None:
    logits = torch.tensor([[1.0, 1.0 + 1e-12], [0.0, 0.0]], dtype=torch.float64)
    alone = sample(logits[:1], [state(temperature=0)]).token_ids
    edited = state(temperature=0, logit_bias={0: 1.0})
    assert sample(logits, [state(temperature=0), edited]).token_ids[:1] == alone == [0]


# The whole of a batch: a row's neighbours must not show


@pytest.mark.parametrize("seed", range(12))
def test_each_row_of_a_batch_is_what_it_is_alone(seed: int) -> None:
    logits, states = random_batch(seed, rows=16)
    batch = sample(logits, states)
    for i, s in enumerate(states):
        alone = sample(logits[i : i + 1], [s])
        assert alone.token_ids == batch.token_ids[i : i + 1]
        assert alone.logprobs == batch.logprobs[i : i + 1]


def test_a_seeded_request_is_the_same_in_any_company_and_place() -> None:
    steps, rng = 12, torch.Generator().manual_seed(0)
    stream = 2 * torch.randn(steps, VOCAB, generator=rng)  # the logits our request meets
    params = SamplingParams(seed=7, temperature=1.5, top_k=12, top_p=0.95)

    def run(companions: int, place: int) -> list[int]:
        own: list[int] = []
        for step in range(steps):
            others = [state(temperature=0 if i % 3 == 0 else 1.0, seed=i, min_p=0.01 * i) for i in range(companions)]
            others.insert(place, state(params, output=own))
            logits = torch.randn(companions + 1, VOCAB, generator=rng)
            logits[place] = stream[step]
            own.append(sample(logits, others).token_ids[place])
        return own

    alone = run(0, 0)
    assert len(set(alone)) > 4
    for companions, place in ((1, 0), (1, 1), (5, 0), (5, 3), (5, 5)):
        assert run(companions, place) == alone


def test_each_step_draws_other_noise_and_a_repeated_step_the_same() -> None:
    batch, logits = SamplingBatch("cpu", 50), torch.zeros(1, 50)
    rows = batch.select([batch.add(state(seed=3))])
    tokens = [Sampler()(logits, rows, [step]).token_ids[0] for step in range(20)]
    assert len(set(tokens)) > 10
    assert tokens == [min(range(50), key=reference_noise(3, step, 50).__getitem__) for step in range(20)]
    assert tokens[::-1] == [Sampler()(logits, rows, [step]).token_ids[0] for step in reversed(range(20))]


def test_rows_of_equal_seed_draw_alike_and_others_do_not() -> None:
    a, b, c, d = sample(torch.zeros(4, 1000), with_seeds(state(), (1, 2, 1, 3))).token_ids
    assert a == c and len({a, b, d}) == 3


@pytest.mark.parametrize("seed", [-7, 0, -(2**63), 2**63 - 1, 2**63, 2**63 + 5])  # a child's may be beyond the range
def test_any_seed_is_taken(seed: int) -> None:
    (token,) = sample(torch.zeros(1, 50), with_seeds(state(), [seed])).token_ids
    assert token == min(range(50), key=reference_noise(seed, 0, 50).__getitem__)


# The batch: rows stay where they are


class Requests:
    """Requests that come, sample and go, with their histories."""

    def __init__(self, vocab_size: int) -> None:
        self.batch = SamplingBatch("cpu", vocab_size)
        self.live: dict[int, tuple[int, SamplingState]] = {}  # by number: slot and state

    def add(self, number: int, s: SamplingState) -> None:
        self.live[number] = (self.batch.add(s), replace(s, output_token_ids=list(s.output_token_ids)))

    def remove(self, number: int) -> None:
        self.batch.remove(self.live.pop(number)[0])

    def step(self, numbers: Sequence[int], logits: torch.Tensor) -> SamplerOutput:
        rows = self.batch.select([self.live[n][0] for n in numbers])
        states = [self.live[n][1] for n in numbers]
        out = Sampler()(logits, rows, [len(s.output_token_ids) for s in states])
        assert out == sample(logits, states), "rows made from the whole history"
        if rows.penalties is not None:
            rows.penalties.counts.add(rows.penalties.slots, out.sampled[rows.penalties.rows])
        for s, token in zip(states, out.token_ids, strict=True):
            s.output_token_ids.append(token)
        return out


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.integers(0, 2**31))
def test_rows_that_are_kept_sample_as_rows_made_anew(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    requests, number = Requests(VOCAB), 0
    for _ in range(20):
        for _ in range(int(torch.randint(4, (), generator=rng))):
            requests.add(number, random_state(rng))
            number += 1
        order = torch.randperm(len(requests.live), generator=rng).tolist()
        chosen = [list(requests.live)[i] for i in order[: max(1, len(order) - 1)]]
        requests.step(chosen, 2 * torch.randn(len(chosen), VOCAB, generator=rng))
        for gone in [n for n in list(requests.live) if torch.rand((), generator=rng) < 0.2]:
            requests.remove(gone)


def test_counts_grow_past_their_first_size() -> None:
    requests = Requests(200)
    for number in range(3):
        requests.add(number, state(prompt=range(number), repetition_penalty=1.5, frequency_penalty=0.5, seed=number))
    tokens = [requests.step([0, 1, 2], torch.zeros(3, 200)).token_ids for _ in range(150)]
    assert len({row[0] for row in tokens}) > 80


# Edges


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, math.nan, 9.0], [0.0, INF, 0.0], [-INF] * 3, [-INF, math.nan, 0.0]], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_a_row_without_a_distribution_is_named_and_fails_alone(
    bad: list[float], temperature: float, kwargs: dict[str, Any]
) -> None:
    logits = torch.zeros(5, 3)
    logits[1] = logits[3] = torch.tensor(bad)
    good, same = state(temperature=0), {"temperature": temperature, **kwargs}
    states = [good, state(**same), state(), state(**same, logit_bias={0: 1.0}), state(**same)]
    out = sample(logits, states)
    assert out.bad_rows == [1, 3]
    assert [out.token_ids[row] in range(3) for row in range(5)] == [True, False, True, False, True]


def test_banning_everything_leaves_no_choice() -> None:
    for temperature in (0.0, 1.0):
        s = state(temperature=temperature, min_tokens=1, stop=[0, 1], logit_bias={2: -INF})
        assert sample(torch.zeros(1, 3), [s]).bad_rows == [0]


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(3),
        torch.zeros(1, 3),
        torch.zeros(3, 3),
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(2, 1, 3),
    ],
)
def test_logits_of_another_shape_or_type_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^logits=.*allowed: floats \[2, vocabulary\]"):
        sample(logits, [state(), state()])


def test_no_rows_give_no_tokens() -> None:
    result = sample(torch.zeros(0, 5), [])
    assert (result.token_ids, result.logprobs) == ([], [])


def test_a_vocabulary_of_one() -> None:
    s = state(top_k=5, top_p=0.1, min_p=0.5, logprobs=-1)
    result = sample(torch.zeros(2, 1), [s, state(temperature=0)])
    assert result.token_ids == [0, 0]
    assert [entry and entry[0].logprob for entry in result.logprobs] == [0.0, None]


def test_extreme_logits_are_sampled_without_overflow() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [1e4, 1e4, -1e4], [-1e30, -1e30, -INF]])
    states = [state(temperature=t, top_p=0.9, min_p=0.1, top_k=2) for t in (0.01, 1.0, 2.0)]
    for seed in range(20):
        a, b, c = sample(logits, [replace(s, seed=seed) for s in states]).token_ids
        assert a == 0 and b in (0, 1) and c in (0, 1)


class LargeTensors(TorchDispatchMode):
    """Counts the operations whose result has at least `numel` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(t, torch.Tensor) and t.numel() >= self.numel for t in made):
            self.made.append(str(func))
        return out


def test_work_that_no_row_asks_for_is_skipped() -> None:
    rows = 8
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()

    def large(states: list[SamplingState]) -> list[str]:
        with LargeTensors(rows * VOCAB) as mode:
            sample(logits, states)
        return mode.made

    greedy = state(temperature=0)
    assert large([greedy] * rows) == []  # neither a copy nor a softmax
    assert large([greedy] * (rows - 1) + [state(temperature=0, logprobs=3)]) == []
    assert large([greedy] * (rows - 1) + [state(top_p=0.5, top_k=3)]) == []
    assert not any("sort" in op or "topk" in op for op in large([state()] * rows))
    assert large([state(temperature=0, frequency_penalty=1.0)] * rows) != []  # the mode does see such work
