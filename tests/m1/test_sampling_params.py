"""`SamplingParams` and `BeamSearchParams` against vLLM's documented defaults, rules and refusals."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sampling_params import BeamSearchParams, SamplingParams

# Written down from vLLM's class definition, field by field.
VLLM_DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],  # vLLM, too, turns None into a list
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "logit_bias": None,
}

NAN, INF = math.nan, math.inf

# field -> values that must be refused whatever the other fields are
REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 1.0, True, "2", None, NAN],
    "presence_penalty": [-2.01, 2.01, INF, NAN, True, "0", None],
    "frequency_penalty": [-2.01, 2.01, -INF, NAN, False, "0", None],
    "repetition_penalty": [0, 0.0, -1.0, INF, NAN, True, "1", None, 10**400, 1e300, 1e-300],
    "temperature": [-0.01, -1, 2.01, INF, NAN, True, "1", None],
    "top_p": [0, 0.0, -0.1, 1.0001, INF, NAN, True, "1", None],
    "top_k": [-2, 1.0, 5.5, True, "5", None, NAN],
    "min_p": [-0.01, 1.01, INF, NAN, True, "0", None],
    "seed": [1.0, True, "1", 2**63, -(2**63) - 1, NAN],
    "stop": ["", [""], ["a", ""], [1], 1, [None], {"a": 1}, b"a", [b"a"]],
    "stop_token_ids": [[-1], [1.0], ["1"], [True], [None], 1, "1", {1: 2}],
    "ignore_eos": [0, 1, None, "yes"],
    "max_tokens": [0, -1, 1.0, True, "1", INF],
    "min_tokens": [-1, 0.5, True, "1", None, 17],  # 17: more than the default max_tokens
    "logprobs": [-2, 1.0, True, "1"],
    "include_stop_str_in_output": [0, 1, None, "no"],
    "skip_special_tokens": [0, 1, None, "no"],
    "spaces_between_special_tokens": [0, 1, None, "no"],
    "logit_bias": [{-1: 1.0}, {1.0: 1.0}, {"1": 1.0}, {True: 1.0}, [(1, 1.0)], 1.0, "1"],
}

ACCEPTED: dict[str, list[Any]] = {
    "n": [1, 2, 1000],
    "presence_penalty": [-2, -2.0, 0, 1.5, 2.0],
    "frequency_penalty": [-2, -2.0, 0, 1.5, 2.0],
    "repetition_penalty": [1e-30, 0.5, 1, 2.0, 2.5, 100],  # vLLM sets no upper bound
    "temperature": [0.01, 1, 2, 2.0],
    "top_p": [1e-300, 0.5, 1, 1.0],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 0.0, 0.5, 1, 1.0],
    "seed": [0, 1, -2, 2**63 - 1, -(2**63)],
    "max_tokens": [1, 10**6, None],
    "min_tokens": [0, 1, 16],
    "logprobs": [None, -1, 0, 5, 10**6],
    "logit_bias": [None, {}, {0: 1.5}, {7: -100}, {7: -INF}],
}


def test_the_fields_and_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert {f.name: getattr(params, f.name) for f in dataclasses.fields(params)} == VLLM_DEFAULTS


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}\b.*=.*allowed: ") as error:
        SamplingParams(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("bias", [INF, NAN, 1e39, "1", None, True, 10**400])
def test_a_bad_bias_is_refused_with_its_token(bias: Any) -> None:
    with pytest.raises(ValueError, match=r"^logit_bias\[7\]=.*allowed: "):
        SamplingParams(logit_bias={3: 1.0, 7: bias})


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ACCEPTED.items() for value in values])
def test_a_good_value_is_kept(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_q.*did you mean 'top_[pk]'"):
        SamplingParams(**{"top_q": 0.5})


def test_fields_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(ValueError, match=r"min_tokens=5 .*<= 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500


def test_greedy_switches_the_filters_off_as_in_vllm() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=5, min_p=0.1)
    assert params.is_greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert not SamplingParams(temperature=0.01).is_greedy


def test_greedy_still_checks_the_filters() -> None:
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(temperature=0, top_p=2.0)


def test_greedy_refuses_several_samples_as_in_vllm() -> None:
    with pytest.raises(ValueError, match=r"^n=2 .*temperature=0"):
        SamplingParams(n=2, temperature=0)


@pytest.mark.parametrize("temperature", [1e-9, 1e-5, 0.0099])
def test_a_tiny_temperature_is_raised_as_in_vllm(temperature: float, caplog: pytest.LogCaptureFixture) -> None:
    # Even below the greedy threshold: vLLM clamps first, so only 0 itself is greedy.
    with caplog.at_level(logging.WARNING, logger="folovllm"):
        params = SamplingParams(temperature=temperature)
    assert params.temperature == 0.01 and not params.is_greedy
    assert "0.01" in caplog.text


@pytest.mark.parametrize("temperature", [0, 0.0, 0.01, 1.0])
def test_other_temperatures_are_kept_in_silence(temperature: float, caplog: pytest.LogCaptureFixture) -> None:
    assert SamplingParams(temperature=temperature).temperature == temperature
    assert not caplog.text


def test_seed_minus_one_is_no_seed_as_in_vllm() -> None:
    assert SamplingParams(seed=-1).seed is None


def test_stop_becomes_a_list() -> None:
    assert SamplingParams(stop="end").stop == ["end"]
    assert SamplingParams(stop=["a", "b"]).stop == ["a", "b"]
    assert SamplingParams(stop=None).stop == []


def test_stop_token_ids_are_listed_once_in_order() -> None:
    assert SamplingParams(stop_token_ids=[5, 3, 5, 1]).stop_token_ids == [5, 3, 1]


def test_the_callers_containers_are_copied() -> None:
    stop, ids, bias = ["a"], [1], {1: 2.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b"), ids.append(2), bias.clear()
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (["a"], [1], {1: 2.0})


def test_numbers_become_floats() -> None:
    params = SamplingParams(temperature=1, top_p=1, min_p=0, presence_penalty=1, logit_bias={1: 2})
    values = [params.temperature, params.top_p, params.min_p, params.presence_penalty, params.logit_bias[1]]
    assert [type(value) for value in values] == [float] * 5


def test_it_cannot_be_changed_past_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 5.0  # type: ignore[misc]
    changed = dataclasses.replace(SamplingParams(top_k=5, stop="x"), temperature=0.5)
    assert (changed.top_k, changed.stop, changed.temperature) == (5, ["x"], 0.5)
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(SamplingParams(), temperature=5.0)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_it_is_plain_data(clone: Any) -> None:
    params = SamplingParams(n=2, seed=3, stop=["a"], stop_token_ids=[1], logit_bias={2: -INF}, logprobs=2)
    assert clone(params) == params
    beams = BeamSearchParams(beam_width=2, max_tokens=3)
    assert clone(beams) == beams


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": -0.0}, False),
        ({"logit_bias": {1: 1.0}, "temperature": 0.5}, False),
    ],
)
def test_has_penalties(changed: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**changed).has_penalties is expected


def test_check_vocab() -> None:
    SamplingParams(stop_token_ids=[0, 99], logit_bias={0: 1.0, 99: 1.0}, logprobs=100).check_vocab(100)
    SamplingParams(logprobs=-1).check_vocab(1)
    SamplingParams().check_vocab(1)
    for bad in ({"stop_token_ids": [5, 100]}, {"logit_bias": {5: 1.0, 100: 1.0}}):
        (field,) = bad
        with pytest.raises(ValueError, match=rf"^{field}=\[100\] .*allowed: .*99"):
            SamplingParams(**bad).check_vocab(100)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^logprobs=101 .*100"):
        SamplingParams(logprobs=101).check_vocab(100)


def test_children_are_single_and_have_seeds_of_their_own() -> None:
    parent = SamplingParams(n=3, seed=10, temperature=0.7, stop=["x"], logit_bias={1: 1.0})
    children = [parent.child(i) for i in range(3)]
    assert [child.seed for child in children] == [10, 11, 12]
    for child in children:
        assert dataclasses.replace(child, n=3, seed=10) == parent
        assert child.n == 1
    assert parent.n == 3 and parent.seed == 10


def test_children_of_an_unseeded_parent_are_unseeded() -> None:
    assert [SamplingParams(n=2).child(i).seed for i in range(2)] == [None, None]


def test_a_child_seed_of_minus_one_is_still_a_seed() -> None:
    assert [SamplingParams(n=3, seed=-2).child(i).seed for i in range(3)] == [-2, -1, 0]


@pytest.mark.parametrize("index", [-1, 2, True, 0.0])
def test_a_child_must_be_one_of_n(index: Any) -> None:
    with pytest.raises(ValueError, match=r"^index="):
        SamplingParams(n=2).child(index)


def test_beam_search_defaults_are_vllms() -> None:
    params = BeamSearchParams(4, 32)
    assert dataclasses.asdict(params) == {
        "beam_width": 4,
        "max_tokens": 32,
        "temperature": 0.0,
        "length_penalty": 1.0,
        "ignore_eos": False,
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("beam_width", v) for v in (0, -1, 1.0, True, "1", None)],
        *[("max_tokens", v) for v in (0, -1, 1.0, True, "1", None)],
        *[("temperature", v) for v in (-0.1, 2.1, NAN, INF, True, "1", None)],
        *[("length_penalty", v) for v in (NAN, INF, -INF, True, "1", None)],
        *[("ignore_eos", v) for v in (0, 1, None)],
    ],
)
def test_beam_search_refuses_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.*allowed: ") as error:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, field: value})
    assert repr(value) in str(error.value)


def test_beam_search_refuses_an_unknown_field() -> None:
    with pytest.raises(ValueError, match="early_stopping"):
        BeamSearchParams(beam_width=2, max_tokens=2, early_stopping=True)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.sampled_from(["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"]),
    st.floats() | st.integers(-5, 5),
)
def test_ranges_are_exactly_the_documented_ones(field: str, value: float) -> None:
    allowed = {
        "temperature": lambda v: 0 <= v <= 2,
        "top_p": lambda v: 0 < v <= 1,
        "min_p": lambda v: 0 <= v <= 1,
        "presence_penalty": lambda v: -2 <= v <= 2,
        "frequency_penalty": lambda v: -2 <= v <= 2,
    }[field](value)
    try:
        SamplingParams(**{field: value})
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == allowed
