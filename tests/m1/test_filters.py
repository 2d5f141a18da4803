"""Each step of the sampler alone, against Hugging Face's logits processors and OpenAI's formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from folovllm.sampling import SamplingBatch, SamplingState
from folovllm.sampling.logits import apply_min_p, apply_temperature, apply_top_k, apply_top_p
from folovllm.sampling.sampler import penalize as penalize_in_place
from folovllm.sampling_params import SamplingParams
from tests.m1.sampling_reference import INF, sample, state

property_test = settings(deadline=None, derandomize=True, max_examples=200)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


# Quarters make ties; the extremes make probabilities of exactly 0 and 1.
a_logit = st.integers(-40, 40).map(lambda i: i / 4) | st.sampled_from([-1e4, 1e4, 0.0, -0.0, -INF])
some_logits = st.lists(a_logit, min_size=2, max_size=24).filter(lambda row: max(row) > -INF)
no_ids = torch.zeros(1, 0, dtype=torch.long)


def penalize(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    batch = SamplingBatch(logits.device, logits.shape[-1])
    asked = batch.select([batch.add(s) for s in states]).penalties
    return logits if asked is None else penalize_in_place(logits.clone(), asked)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@property_test
@given(some_logits, st.floats(0.01, 2.0))
def test_temperature_is_hugging_faces(row: list[float], temperature: float) -> None:
    logits = torch.tensor([row])
    same(
        apply_temperature(logits, column(temperature)),
        hf.TemperatureLogitsWarper(temperature)(no_ids, logits),
    )


@property_test
@given(some_logits, st.integers(1, 30))
def test_top_k_is_hugging_faces_with_ties_and_large_k(row: list[float], k: int) -> None:
    logits = torch.tensor([row])
    same(apply_top_k(logits, torch.tensor([[k]])), hf.TopKLogitsWarper(k)(no_ids, logits))


@property_test
@given(some_logits, st.floats(0.0, 1.0))
def test_min_p_is_hugging_faces(row: list[float], min_p: float) -> None:
    logits = torch.tensor([row])
    same(apply_min_p(logits, column(min_p)), hf.MinPLogitsWarper(min_p)(no_ids, logits))


def masses_from_below(row: Sequence[float]) -> list[float]:
    return torch.tensor(row, dtype=torch.float64).softmax(0).sort().values.cumsum(0).tolist()


@property_test
@given(some_logits, st.floats(1e-3, 1.0))
def test_top_p_is_hugging_faces(row: list[float], top_p: float) -> None:
    # vLLM rounds top_p to float32 and then subtracts, Hugging Face subtracts and then rounds, so a mass that
    # lies on 1 - top_p may fall either way. Which of two equals is cut may differ: kept values are compared.
    assume(top_p == 1 or min(abs(mass - (1 - top_p)) for mass in masses_from_below(row)) > 1e-6)
    logits = torch.tensor([row])
    ours = apply_top_p(logits, column(top_p))
    theirs = hf.TopPLogitsWarper(top_p)(no_ids, logits)
    same(ours.sort().values, theirs.sort().values)


@property_test
@given(some_logits, st.floats(1e-3, 0.999))
def test_top_p_is_the_smallest_set_that_reaches_p(row: list[float], top_p: float) -> None:
    kept = (apply_top_p(torch.tensor([row]), column(top_p))[0] > -INF).tolist()
    probs = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    inside = [p for p, keep in zip(probs, kept, strict=True) if keep]
    outside = [p for p, keep in zip(probs, kept, strict=True) if not keep]
    assert sum(inside) > top_p - 1e-6
    assert len(inside) == 1 or sum(inside) - min(inside) < top_p + 1e-6
    assert min(inside) >= max(outside, default=0.0)


def test_top_p_cuts_a_tie_from_the_lower_ids() -> None:
    # Four tokens of probability 1/4: three reach 0.6, and two reach exactly 0.5.
    kept = apply_top_p(torch.zeros(3, 4), column(0.6, 0.5, 1e-9)) > -INF
    assert kept.tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
    ]


def test_filters_leave_their_input_alone() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    apply_temperature(logits, column(0.5, 1.0, 2.0))
    apply_min_p(logits, column(0.5, 0.1, 1.0))
    apply_top_k(logits, torch.tensor([[1], [2], [3]]))
    apply_top_p(logits, column(0.5, 0.1, 0.9))
    assert torch.equal(logits, before)


@property_test
@given(some_logits, st.data(), st.floats(0.25, 4.0))
def test_repetition_penalty_is_hugging_faces(row: list[float], data: st.DataObject, penalty: float) -> None:
    ids = st.lists(st.integers(0, len(row) - 1), max_size=12)
    prompt, output = data.draw(ids), data.draw(ids)
    logits = torch.tensor([row])
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output], dtype=torch.long), logits)
    logits = penalize(logits, [state(prompt=prompt, output=output, repetition_penalty=penalty)])
    same(logits, theirs)


@property_test
@given(some_logits, st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_follow_openais_formula(
    row: list[float], data: st.DataObject, presence: float, frequency: float
) -> None:
    ids = st.lists(st.integers(0, len(row) - 1), max_size=12)
    prompt, output = data.draw(ids), data.draw(ids)
    logits = torch.tensor([row])
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    logits = penalize(logits, [state(params, prompt, output)])
    # mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, where c counts the output only
    expected = [mu - output.count(j) * frequency - float(output.count(j) > 0) * presence for j, mu in enumerate(row)]
    torch.testing.assert_close(logits[0].double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-5)


@property_test
@given(some_logits, st.data(), st.integers(0, 6), st.integers(0, 6))
def test_min_tokens_is_hugging_faces(row: list[float], data: st.DataObject, minimum: int, done: int) -> None:
    stop = data.draw(st.sets(st.integers(0, len(row) - 1), min_size=1, max_size=len(row) - 1))
    prompt, output = [0, 1], [1] * done
    logits = torch.tensor([row])
    theirs = hf.MinNewTokensLengthLogitsProcessor(len(prompt), minimum, sorted(stop))(
        torch.tensor([prompt + output]), logits
    )
    assume(theirs.max() > -INF)
    s = state(prompt=prompt, output=output, stop=list(stop), min_tokens=minimum, temperature=0)
    assert sample(logits, [s]).token_ids == [int(theirs.argmax())]


@property_test
@given(some_logits, st.data())
def test_logit_bias_is_hugging_faces(row: list[float], data: st.DataObject) -> None:
    one = st.floats(-50, 50, width=32) | st.just(-INF)
    bias = data.draw(st.dictionaries(st.integers(0, len(row) - 1), one, min_size=1, max_size=6))
    logits = torch.tensor([row])
    theirs = hf.SequenceBiasLogitsProcessor([[[token], b] for token, b in bias.items()])(
        torch.zeros(1, 1, dtype=torch.long), logits
    )
    assume(theirs.max() > -INF)
    assert sample(logits, [state(logit_bias=bias, temperature=0)]).token_ids == [int(theirs.argmax())]


def test_penalties_touch_only_the_rows_that_ask() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    states = [
        state(prompt=[1], output=[2]),
        state(prompt=[1], output=[2, 2], frequency_penalty=1.0),
        state(prompt=[1], output=[2], min_tokens=3),
    ]
    logits = penalize(logits, states)
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert (logits[1] != before[1]).nonzero().tolist() == [[2]]


def test_penalties_ignore_ids_without_a_logit() -> None:
    # Column V of one row must not become column 0 of the next.
    logits = torch.ones(2, 4)
    logits = penalize(logits, [state(prompt=[4, 9], output=[4, 5], repetition_penalty=2.0)] * 2)
    assert torch.equal(logits, torch.ones(2, 4))


def test_penalties_do_not_depend_on_the_default_dtype() -> None:
    logits = torch.ones(1, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = penalize(logits, [state(output=[1, 1], frequency_penalty=0.1, presence_penalty=0.3)])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(logits, torch.tensor([[1.0, 0.5, 1.0, 1.0]]))


@property_test
@given(st.lists(some_logits, min_size=1, max_size=4), st.floats(1e-3, 0.999), st.integers(1, 12))
def test_top_p_among_candidates_is_top_p_of_all(rows: list[list[float]], top_p: float, num_candidates: int) -> None:
    assume(all(min(abs(mass - (1 - top_p)) for mass in masses_from_below(row)) > 1e-6 for row in rows))
    width = max(map(len, rows))
    logits = torch.tensor([row + [-INF] * (width - len(row)) for row in rows])
    column_of_p = torch.full((len(rows), 1), top_p)
    kept = apply_top_p(logits, column_of_p, num_candidates)
    assert torch.equal(kept, apply_top_p(logits, column_of_p))
