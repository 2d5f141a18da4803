"""The sampler against the float64 reference, alone and in company, and at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.sampling import Sampler, SamplingState
from folovllm.sampling_params import SamplingParams
from tests.m1.sampling_reference import INF, VOCAB, random_batch, reference_probs, seeded, state


def test_every_row_of_a_mixed_batch_is_the_references() -> None:
    # A seed's noise is known, so the token is argmax(p / noise): a draw tests every probability of its row.
    checked = unclear = 0
    for seed in range(40):
        logits, states = random_batch(seed, rows=25)
        token_ids = Sampler()(logits, [seeded(s) for s in states]).token_ids
        for row, s, token_id in zip(logits.double().tolist(), states, token_ids, strict=True):
            probs, near = reference_probs(row, s)
            noise = torch.empty(VOCAB).exponential_(generator=torch.Generator().manual_seed(s.params.seed))
            if s.params.temperature == 0:
                noise.fill_(1.0)
            scores = [p / n for p, n in zip(probs, noise.tolist(), strict=True)]
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
    assert Sampler()(logits, [s]).token_ids == [1]
    # Repetition before frequency: 3 / 2 - 1 = 0.5, between 0.4 and 0.8; the other way round: (3 - 1) / 2 = 1.
    for third, expected in ((0.4, 0), (0.8, 2)):
        logits = torch.tensor([[3.0, -9.0, third]])
        s = state(output=[0], temperature=0, repetition_penalty=2.0, frequency_penalty=1.0)
        assert Sampler()(logits, [s]).token_ids == [expected]


def test_a_bias_cannot_lift_a_ban() -> None:
    logits = torch.zeros(1, 4)
    s = state(temperature=0, min_tokens=1, stop=[2], logit_bias={2: 100.0, 3: 1.0})
    assert Sampler()(logits, [s]).token_ids == [3]


def test_stop_tokens_are_free_from_min_tokens_on() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for length, expected in ((0, 2), (1, 2), (2, 1), (3, 1)):
        s = state(output=[0] * length, stop=[1], min_tokens=2, temperature=0)
        assert Sampler()(logits, [s]).token_ids == [expected]


def test_the_argmax_takes_the_first_of_equals_as_hugging_face_does() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0], [1.0, 1.0, 0.0, 1.0]])
    assert Sampler()(logits, [state(temperature=0)] * 2).token_ids == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_the_callers_logits_are_never_changed(seed: int, dtype: torch.dtype) -> None:
    logits, states = random_batch(seed, rows=12)
    logits = logits.to(dtype)
    before = logits.clone()
    Sampler()(logits, [seeded(s) for s in states])
    assert torch.equal(logits, before)
    for s in states:  # alone, a row takes the paths without a gather
        Sampler()(logits[:1], [s])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_float_type_is_sampled_as_its_float32_values(dtype: torch.dtype) -> None:
    for seed in range(4):
        logits, states = random_batch(seed, rows=12)
        logits = logits.to(dtype)
        ours = Sampler()(logits, [seeded(s) for s in states])
        assert ours == Sampler()(logits.float(), [seeded(s) for s in states])


def test_the_default_dtype_plays_no_part() -> None:
    # Model loaders change it. In bfloat16 this bias would be 1, and this min_p a half.
    biased = state(temperature=0, logit_bias={1: 1.001})
    filtered = state(min_p=0.5001)
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = torch.tensor([[1.0005, 0.0]], dtype=torch.float32)
        assert Sampler()(logits, [biased]).token_ids == [1]
        logits = torch.tensor([0.0, math.log(0.50005)], dtype=torch.float32).expand(50, -1)
        assert Sampler()(logits, [filtered] * 50).token_ids == [0] * 50
    finally:
        torch.set_default_dtype(torch.float32)


def test_float64_ties_in_float32_do_not_depend_on_the_neighbours() -> None:
    logits = torch.tensor([[1.0, 1.0 + 1e-12], [0.0, 0.0]], dtype=torch.float64)
    alone = Sampler()(logits[:1], [state(temperature=0)]).token_ids
    edited = state(temperature=0, logit_bias={0: 1.0})
    assert Sampler()(logits, [state(temperature=0), edited]).token_ids[:1] == alone == [0]


# The whole of a batch: a row's neighbours must not show


@pytest.mark.parametrize("seed", range(12))
def test_each_row_of_a_batch_is_what_it_is_alone(seed: int) -> None:
    logits, states = random_batch(seed, rows=16)
    batch = Sampler(seed=1)(logits, [seeded(s) for s in states])
    for i, s in enumerate(states):
        alone = Sampler(seed=2)(logits[i : i + 1], [seeded(s)])
        assert alone.token_ids == batch.token_ids[i : i + 1]
        assert alone.logprobs == batch.logprobs[i : i + 1]


def test_a_seeded_request_is_the_same_in_any_company_and_place() -> None:
    steps, rng = 12, torch.Generator().manual_seed(0)
    stream = 2 * torch.randn(steps, VOCAB, generator=rng)  # the logits our request meets
    params = SamplingParams(seed=7, temperature=1.5, top_k=12, top_p=0.95)

    def run(companions: int, place: int, seeds: Callable[[int], int | None]) -> list[int]:
        sampler = Sampler(seed=companions)
        own = SamplingState(params, [], [], frozenset(), sampler.make_generator(params))
        for step in range(steps):
            others = [
                state(temperature=0 if i % 3 == 0 else 1.0, seed=seeds(i), min_p=0.01 * i) for i in range(companions)
            ]
            states = [seeded(s) for s in others]
            states.insert(place, own)
            logits = torch.randn(companions + 1, VOCAB, generator=rng)
            logits[place] = stream[step]
            own.output_token_ids.append(sampler(logits, states).token_ids[place])
        return own.output_token_ids

    alone = run(0, 0, lambda i: None)
    assert len(set(alone)) > 4
    for companions, place in ((1, 0), (1, 1), (5, 0), (5, 3), (5, 5)):
        assert run(companions, place, lambda i: None) == alone
        assert run(companions, place, lambda i: i) == alone


def test_a_generator_is_not_reset_between_steps() -> None:
    sampler, params = Sampler(), SamplingParams(seed=3)
    own = SamplingState(params, [], [], frozenset(), sampler.make_generator(params))
    logits = torch.zeros(1, 50)
    tokens = [sampler(logits, [own]).token_ids[0] for _ in range(20)]
    assert len(set(tokens)) > 10
    noise = torch.Generator().manual_seed(3)
    assert tokens == [int(torch.empty(50).exponential_(generator=noise).argmin()) for _ in range(20)]


def test_rows_of_equal_seed_draw_alike_and_others_do_not() -> None:
    logits = torch.zeros(4, 1000)
    states = [seeded(state(seed=seed)) for seed in (1, 2, 1, 3)]
    a, b, c, d = Sampler()(logits, states).token_ids
    assert a == c and len({a, b, d}) == 3


def test_unseeded_rows_draw_independently_of_each_other() -> None:
    assert len(set(Sampler()(torch.zeros(50, 1000), [state()] * 50).token_ids)) > 40


def test_the_samplers_seed_makes_unseeded_requests_reproducible() -> None:
    logits, states = random_batch(0, rows=10, greedy_share=0.0)

    def run(seed: int) -> list[list[int]]:
        sampler = Sampler(seed)
        return [sampler(logits, states).token_ids for _ in range(10)]

    first = run(5)
    assert first == run(5)
    assert first != run(6)
    assert len({tuple(step) for step in first}) > 5  # nor is it reset between steps


def test_only_seeded_random_requests_get_a_generator() -> None:
    sampler = Sampler(seed=9)
    assert sampler.make_generator(SamplingParams()) is None
    assert sampler.make_generator(SamplingParams(seed=1, temperature=0)) is None
    generator = sampler.make_generator(SamplingParams(seed=-7))
    assert generator is not None and generator.device == torch.device("cpu")
    # A child's seed may be one past the largest, which is still a seed to torch.
    assert sampler.make_generator(SamplingParams(n=2, seed=2**63 - 1).child(1)) is not None


def test_a_greedy_request_does_not_disturb_the_shared_stream() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    with_greedy, without = Sampler(3), Sampler(3)
    mixed = [state(), state(temperature=0), state(), state(temperature=0), state(), state()]
    random_rows = [0, 2, 4, 5]
    for _ in range(5):
        ids = with_greedy(logits, mixed).token_ids
        assert [ids[i] for i in random_rows] == without(logits[random_rows], [state()] * 4).token_ids


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
    out = Sampler()(logits, states)
    assert out.bad_rows == [1, 3]
    assert [out.token_ids[row] in range(3) for row in range(5)] == [True, False, True, False, True]


def test_banning_everything_leaves_no_choice() -> None:
    for temperature in (0.0, 1.0):
        s = state(temperature=temperature, min_tokens=1, stop=[0, 1], logit_bias={2: -INF})
        assert Sampler()(torch.zeros(1, 3), [s]).bad_rows == [0]


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
        Sampler()(logits, [state(), state()])


def test_logits_on_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"meta.*allowed: .*cpu"):
        Sampler()(torch.zeros(1, 3, device="meta"), [state()])


def test_no_rows_give_no_tokens() -> None:
    result = Sampler()(torch.zeros(0, 5), [])
    assert (result.token_ids, result.logprobs) == ([], [])


def test_a_vocabulary_of_one() -> None:
    s = state(top_k=5, top_p=0.1, min_p=0.5, logprobs=-1)
    result = Sampler()(torch.zeros(2, 1), [s, state(temperature=0)])
    assert result.token_ids == [0, 0]
    assert [entry and entry[0].logprob for entry in result.logprobs] == [0.0, None]


def test_extreme_logits_are_sampled_without_overflow() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [1e4, 1e4, -1e4], [-1e30, -1e30, -INF]])
    states = [state(temperature=t, top_p=0.9, min_p=0.1, top_k=2) for t in (0.01, 1.0, 2.0)]
    sampler = Sampler()
    for _ in range(20):
        a, b, c = sampler(logits, states).token_ids
        assert a == 0 and b in (0, 1) and c in (0, 1)


def test_noise_of_exactly_zero_cannot_revive_a_dropped_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return noise.copy_(torch.tensor([-0.0, 1.0, 0.0, 1.0]))

    monkeypatch.setattr(torch.Tensor, "exponential_", zeros)
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
    assert Sampler()(logits, [state(top_k=2)]).token_ids == [3]


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
            Sampler()(logits, states)
        return mode.made

    greedy = state(temperature=0)
    assert large([greedy] * rows) == []  # neither a copy nor a softmax
    assert large([greedy] * (rows - 1) + [state(temperature=0, logprobs=3)]) == []
    assert large([greedy] * (rows - 1) + [state(top_p=0.5, top_k=3)]) == []
    assert not any("sort" in op or "topk" in op for op in large([state()] * rows))
    assert large([state(temperature=0, frequency_penalty=1.0)] * rows) != []  # the mode does see such work
