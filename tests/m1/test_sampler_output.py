"""What the sampler reports: tokens as often as their probability says, and log probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from folovllm.sampling import Sampler, SamplingBatch
from folovllm.sampling_params import SamplingParams
from tests.m1.sampling_reference import INF, VOCAB, random_batch, reference_probs, sample, state, with_seeds

DRAWS = 10_000
SPREAD = [2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.3, -0.6, -0.9, -1.1]


def assert_frequencies(tokens: Sequence[int], probs: Sequence[float]) -> None:
    """Pearson's chi-square test at 0.1 %."""
    counts = [tokens.count(token) for token in range(len(probs))]
    expected = [p * len(tokens) for p in probs]
    assert all(n == 0 for n, e in zip(counts, expected, strict=True) if e == 0)
    possible = [token for token, e in enumerate(expected) if e > 0]
    assert all(expected[token] >= 5 for token in possible), "the test's approximation needs 5 per cell"
    if len(possible) > 1:
        assert chisquare([counts[t] for t in possible], [expected[t] for t in possible]).pvalue > 1e-3


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 2},  # the second and third tie, so three are sampled
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 0.75},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.3, "logit_bias": {9: 5.0, 0: -INF}, "top_p": 0.9},
        {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": -0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [None, 11])
def test_tokens_come_as_often_as_they_should(kwargs: dict[str, Any], seed: int | None) -> None:
    s = state(SamplingParams(seed=seed, **kwargs), prompt=[0, 5], output=[3, 3, 9])
    probs, near = reference_probs(SPREAD, s)
    assert not near
    if seed is None:  # many requests, one step
        tokens = sample(torch.tensor(SPREAD).expand(DRAWS, -1), with_seeds(s, range(DRAWS))).token_ids
    else:  # many steps of one request
        batch = SamplingBatch("cpu", len(SPREAD))
        rows = batch.select([batch.add(s)] * DRAWS)
        tokens = Sampler()(torch.tensor(SPREAD).expand(DRAWS, -1), rows, range(DRAWS)).token_ids
    assert_frequencies(tokens, probs)


def test_the_chi_square_test_would_notice() -> None:
    # The draws at temperature 1 are no draws at temperature 1.1: the tests above have power.
    tokens = sample(torch.tensor(SPREAD).expand(DRAWS, -1), with_seeds(state(), range(DRAWS))).token_ids
    with pytest.raises(AssertionError):
        assert_frequencies(tokens, reference_probs(SPREAD, state(temperature=1.1))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [0, 1, 5, VOCAB, VOCAB + 10, -1])
def test_logprobs_are_those_of_the_raw_logits(wanted: int, dtype: torch.dtype) -> None:
    logits, states = random_batch(wanted + 5, rows=20)
    logits = logits.to(dtype)
    if dtype == torch.float32:  # ranks of equals have a test of their own
        assert all(len(set(row)) == VOCAB for row in logits.tolist())
    states = [replace(s, params=replace(s.params, logprobs=wanted)) for s in states]
    result = sample(logits, states)
    truth = logits.double().log_softmax(-1).tolist()
    for token_id, entry, lp in zip(result.token_ids, result.logprobs, truth, strict=True):
        assert entry is not None
        by_rank = sorted(range(VOCAB), key=lambda t: -lp[t])
        top = by_rank if wanted == -1 else by_rank[:wanted]
        if dtype == torch.float32:
            assert list(entry) == [token_id, *(t for t in top if t != token_id)]
            assert [e.rank for e in entry.values()] == [by_rank.index(t) + 1 for t in entry]
        assert [e.logprob for e in entry.values()] == pytest.approx([lp[t] for t in entry], abs=1e-5)
        assert all(e.decoded_token is None for e in entry.values())


def test_some_draws_fall_outside_the_top() -> None:
    # What the test above needs in order to mean something: a chosen token in front of likelier ones.
    logits, states = random_batch(6, rows=20)
    states = [replace(s, params=replace(s.params, logprobs=1)) for s in states]
    assert {len(entry or ()) for entry in sample(logits, states).logprobs} == {1, 2}


def test_rows_that_do_not_ask_get_no_logprobs() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = [None, 2, 0, None]
    result = sample(logits, [state(temperature=0, logprobs=k) for k in wanted])
    assert [None if entry is None else len(entry) for entry in result.logprobs] == [None, 2, 1, None]


def test_a_tie_counts_against_a_chosen_token_outside_the_top_as_in_vllm() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    entry = sample(logits, [state(temperature=0, logit_bias={2: 9.0}, logprobs=1)]).logprobs[0]
    assert entry is not None
    assert [(token, e.rank) for token, e in entry.items()] == [(2, 4), (0, 1)]


def test_logprobs_of_impossible_tokens_are_minus_infinity() -> None:
    entry = sample(torch.tensor([[0.0, -INF, 0.0]]), [state(temperature=0, logprobs=-1)]).logprobs[0]
    assert entry is not None
    assert {token: e.logprob for token, e in entry.items()} == {
        0: pytest.approx(-math.log(2)),
        2: pytest.approx(-math.log(2)),
        1: -INF,
    }
