"""The workloads are what the course says they are, seeded, and the same everywhere."""

from __future__ import annotations

import pytest

from folovllm.config import MILESTONES, EngineConfig
from folovllm.course.bench.engines import engine_kwargs
from folovllm.course.bench.record import token_hash
from folovllm.course.bench.systems import (
    System,
    choose_base,
    not_applicable,
    parse_milestones,
    parse_peers,
    variants_of,
    with_max_num_seqs,
)
from folovllm.course.bench.workloads import (
    WORKLOADS,
    BenchRequest,
    draw,
    get_workload,
    longest,
    shared_prefix_len,
)

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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("static:0", r"peer='static:0': batch_size='0' is not valid; allowed: an integer >= 1"),
        ("static:four", r"batch_size='four'"),
        ("static:", r"batch_size=''"),
        ("static:4:1", r"peer='static:4:1' is not valid; allowed: .*static:N, dynamic:N:S"),
        ("dynamic", r"peer='dynamic' is not valid; allowed: .*dynamic:N:S"),
        ("dynamic:4", r"peer='dynamic:4' is not valid"),
        ("hf:dynamic:4:x", r"peer='dynamic:4:x': window='x' is not valid; allowed: a number >= 0, in seconds"),
        ("dynamic:4:-1", r"window='-1'"),
        ("dynamic:4:nan", r"window='nan'"),
        ("dynamic:-4:1", r"batch_size='-4'"),
        ("continuous:4", r"peer='continuous:4' is not valid"),
        ("sequential:1", r"peer='sequential:1' is not valid"),
    ],
)
def test_peers_with_numbers_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        parse_peers(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m1@2", r"milestone='m1@2': max_num_seqs='2' is not valid; allowed: an integer >= 1 and <= 1"),
        ("m2@0", r"milestone='m2@0': max_num_seqs='0' is not valid; allowed: an integer >= 1$"),
        ("m2@", r"max_num_seqs=''"),
        ("m2:padded@4@5", r"max_num_seqs='4@5'"),
        ("m2@4:padded", r"max_num_seqs='4:padded'"),
        ("m2:paged@4", r"milestone='m2:paged@4' is not valid; allowed: m2:padded, m2:loop"),
    ],
)
def test_limits_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        parse_milestones(name)


def test_numbers_in_names():
    assert parse_milestones("m2:padded@04, m2@1,m1@1") == [
        System("m2:padded@4", milestone="m2", variant="padded", max_num_seqs=4),
        System("m2@1", milestone="m2", max_num_seqs=1),
        System("m1@1", milestone="m1", max_num_seqs=1),
    ]
    assert parse_peers("static:4,hf:dynamic:8:0.250") == [
        System("hf:static:4", peer="static", batch_size=4),
        System("hf:dynamic:8:0.25", peer="dynamic", batch_size=8, window=0.25),
    ]


def test_a_common_limit_is_for_milestones_that_name_none():
    systems = [*parse_milestones("m1,m2,m2:padded@8"), *parse_peers("static")]
    assert [s.max_num_seqs for s in with_max_num_seqs(systems, 4)] == [None, 4, 8, None]
    assert with_max_num_seqs(systems, None) == systems


def test_a_rate_shows_in_what_is_said_of_a_workload():
    assert WORKLOADS["w2"].describe() == "16 at once, 32-256 in, 16-128 out"
    assert WORKLOADS["w2"].describe(2.5) == "16 arriving at 2.5/s, 32-256 in, 16-128 out"
    assert all("at once" not in w.describe(1) for w in WORKLOADS.values())
    assert all("arriving" in w.describe(1) for w in WORKLOADS.values() if w.num_requests > 1)


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
    peers = parse_peers("sequential,static,static:4,dynamic:4:1,continuous")
    reasons = {s.name: not_applicable(s, mixed) for s in [*parse_milestones("m1"), *peers]}
    assert [name for name, reason in reasons.items() if reason] == [s.name for s in peers[:-1]]
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


def test_a_token_budget_is_a_variant_of_milestones_that_split_prompts() -> None:
    assert parse_milestones("m4:budget=256,m4:budget=4096@2,m4") == [
        System("m4:budget=256", milestone="m4", max_num_batched_tokens=256),
        System("m4:budget=4096@2", milestone="m4", max_num_batched_tokens=4096, max_num_seqs=2),
        System("m4", milestone="m4"),
    ]
    for name in ("m3:budget=256", "m4:budget=0", "m4:budget=", "m4:budget=x", "m4:loop"):
        with pytest.raises(ValueError, match=f"milestone='{name}'"):
            parse_milestones(name)
