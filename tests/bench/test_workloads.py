"""The workloads are what the course says they are, seeded, and the same everywhere."""

from __future__ import annotations

import pytest

from folovllm.bench.engines import engine_kwargs
from folovllm.bench.record import token_hash
from folovllm.bench.systems import (
    choose_base,
    not_applicable,
    parse_milestones,
    parse_peers,
    variants_of,
)
from folovllm.bench.workloads import (
    WORKLOADS,
    BenchRequest,
    draw,
    get_workload,
    longest,
    shared_prefix_len,
)
from folovllm.config import MILESTONES, EngineConfig

VOCAB = 1000


def shapes(name: str, **kwargs: object) -> list[tuple[int, int, int]]:
    drawn = draw(get_workload(name), VOCAB, **kwargs)  # type: ignore[arg-type]
    return [(r.num_prompt_tokens, r.max_tokens, r.start_after) for r in drawn]


def test_w1_is_one_request():
    assert shapes("w1") == [(128, 64, 0)]


@pytest.mark.parametrize(
    ("name", "count", "inputs", "outputs"), [("w2", 16, (32, 256), (16, 128)), ("paper", 256, (100, 1024), (100, 1024))]
)
def test_lengths_are_uniform_in_their_range(name, count, inputs, outputs):
    drawn = shapes(name)
    assert len(drawn) == count
    for column, (low, high) in ((0, inputs), (1, outputs)):
        lengths = [shape[column] for shape in drawn]
        assert low <= min(lengths) and max(lengths) <= high
        # Uniform: the mean of n draws lies within 4 standard errors, (high - low) / sqrt(12 n), of the middle.
        error = (high - low) / (12 * count) ** 0.5
        assert abs(sum(lengths) / count - (low + high) / 2) < 4 * error
        assert len(set(lengths)) > count / 2


def test_w3_shares_a_prefix_and_nothing_more():
    drawn = draw(WORKLOADS["w3"], VOCAB)
    assert shapes("w3") == [(400, 32, 0)] * 16
    assert len({tuple(r.prompt_token_ids[:384]) for r in drawn}) == 1
    assert len({tuple(r.prompt_token_ids[384:]) for r in drawn}) == 16
    assert shared_prefix_len(drawn) == 384
    assert shared_prefix_len(draw(WORKLOADS["w2"], VOCAB)) == 0


def test_a_shared_prefix_never_is_a_whole_prompt():
    # The last token of a prompt is always computed: its logits are what is sampled.
    assert shared_prefix_len([BenchRequest([1, 2, 3], 1), BenchRequest([1, 2, 3], 1)]) == 2
    assert shared_prefix_len([BenchRequest([1, 2, 3], 1)]) == 0


def test_mixed_has_a_long_prompt_that_comes_late():
    assert shapes("mixed") == [(32, 96, 0)] * 8 + [(2048, 16, 16)]
    assert longest(draw(WORKLOADS["mixed"], VOCAB)) == 2064


# Drawn once, on Python 3.11: results of two machines can be compared only if their requests are the same.
DIGESTS = {
    "w1": "ed8ebadafc22c83f",
    "w2": "5c6c032bfdd9a0f3",
    "w3": "5fcc1b5f060e3afd",
    "mixed": "f449bd52d710cfa3",
    "paper": "dec7e80555171a58",
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_gives_the_same_requests_everywhere(name):
    drawn = draw(WORKLOADS[name], VOCAB)
    assert (
        token_hash([x for r in drawn for x in (r.num_prompt_tokens, r.max_tokens, *r.prompt_token_ids)])
        == DIGESTS[name]
    )
    assert drawn == draw(WORKLOADS[name], VOCAB, seed=0)
    assert drawn != draw(WORKLOADS[name], VOCAB, seed=1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_token_ids_fit_any_vocabulary_and_lengths_do_not_depend_on_it(name):
    small = draw(WORKLOADS[name], 7)
    assert {t for r in small for t in r.prompt_token_ids} == set(range(7))
    large = draw(WORKLOADS[name], 50_000)
    assert [r.num_prompt_tokens for r in small] == [r.num_prompt_tokens for r in large]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_warm_up_has_the_same_prompt_lengths_and_other_tokens(name):
    real, warm = draw(WORKLOADS[name], VOCAB), draw(WORKLOADS[name], VOCAB, warm_up=True)
    assert [r.num_prompt_tokens for r in real] == [r.num_prompt_tokens for r in warm]
    # Not one block of 16 in common: a prefix cache that survived the warm-up would find nothing.
    assert not {tuple(r.prompt_token_ids[:16]) for r in real} & {tuple(r.prompt_token_ids[:16]) for r in warm}
    assert {(r.max_tokens, r.start_after) for r in warm} == {(4, 0)}


def test_scale_shrinks_every_length_but_not_the_number_of_requests():
    assert shapes("w1", scale=0.25) == [(32, 16, 0)]
    assert shapes("mixed", scale=0.125) == [(4, 12, 0)] * 8 + [(256, 2, 2)]
    assert shared_prefix_len(draw(WORKLOADS["w3"], VOCAB, scale=0.25)) == 96
    for name in WORKLOADS:  # never nothing, and the late request never too late
        tiny = shapes(name, scale=1e-6)
        assert all(prompt >= 1 and tokens == 2 and after <= 1 for prompt, tokens, after in tiny)


@pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan")])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale="):
        draw(WORKLOADS["w1"], VOCAB, scale=scale)


def test_names_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"workload='w9'.*w1, w2, w3, mixed, paper"):
        get_workload("w9")
    with pytest.raises(ValueError, match=r"milestone='m0'.*m1"):
        parse_milestones("m1,m0")
    with pytest.raises(ValueError, match=r"milestone='m1:loop'.*m1 alone, which has no variants"):
        parse_milestones("m1:loop")
    with pytest.raises(ValueError, match=r"milestone='m1:'"):
        parse_milestones("m1:")
    with pytest.raises(ValueError, match=r"peer='vllm'.*sequential, static, continuous"):
        parse_peers("vllm")


def test_names_become_systems():
    assert [s.name for s in parse_milestones("all")] == list(MILESTONES)
    assert [s.name for s in parse_milestones(" m1 ,")] == ["m1"]
    assert parse_milestones("") == [] == parse_peers("")
    assert [(s.name, s.peer) for s in parse_peers("static,hf:sequential")] == [
        ("hf:static", "static"),
        ("hf:sequential", "sequential"),
    ]
    for name in MILESTONES:
        for variant in variants_of(name):
            (system,) = parse_milestones(f"{name}:{variant}")
            assert (system.milestone, system.variant) == (name, variant)


def test_the_base_is_the_first_peer_unless_one_is_named():
    systems = [*parse_milestones("m1"), *parse_peers("static,sequential")]
    assert choose_base(None, systems) == "hf:static"
    assert choose_base("m1", systems) == "m1"
    assert choose_base(None, systems[:1]) == "m1"
    with pytest.raises(ValueError, match=r"base='m2'.*m1, hf:static, hf:sequential"):
        choose_base("m2", systems)
    with pytest.raises(ValueError, match="nothing to run"):
        choose_base(None, [])
    with pytest.raises(ValueError, match="each system once"):
        choose_base(None, [*systems, systems[0]])


def test_generate_takes_no_late_request():
    mixed, w2 = WORKLOADS["mixed"], WORKLOADS["w2"]
    reasons = {s.name: not_applicable(s, mixed) for s in [*parse_milestones("m1"), *parse_peers("all")]}
    assert {name for name, reason in reasons.items() if reason} == {"hf:sequential", "hf:static"}
    assert all(not_applicable(s, w2) is None for s in parse_peers("all"))


@pytest.mark.parametrize("milestone", MILESTONES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_milestone_accepts_the_keywords_it_is_given(milestone, name):
    requests = draw(WORKLOADS[name], VOCAB)
    for text in (milestone, *(f"{milestone}:{v}" for v in variants_of(milestone))):
        (system,) = parse_milestones(text)
        config = EngineConfig.from_kwargs(**engine_kwargs(system, requests, max_num_batched_tokens=256))
        limit = MILESTONES[milestone].max_num_seqs_limit
        assert config.max_num_seqs == (len(requests) if limit is None else min(limit, len(requests)))
        assert config.model.max_model_len == longest(requests)
        # A budget smaller than a prompt would refuse it where prompts cannot be split.
        budget = config.max_num_batched_tokens(longest(requests))
        assert (budget == 256) if MILESTONES[milestone].chunked_prefill else budget >= 2048
