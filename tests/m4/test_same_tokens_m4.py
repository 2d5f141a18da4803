"""Promise 1 at M4: in chunks of any size, with prefixes shared in blocks of any size, the tokens are Hugging Face's.

`stats` proves that chunks and hits really happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, BeamSearchParams, SamplingParams
from tests.m3.cases import MODELS
from tests.m3.helpers import check_all_free, manager_of
from tests.m3.test_beam_search import EOS_SETS, PROMPTS, Searched, check_beams
from tests.m4.cases import SHAPES, SharedCase, forget_nothing
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens

NEW_TOKENS = 10
each_model = pytest.mark.parametrize("name", MODELS)
each_family = pytest.mark.parametrize("name", FAMILIES)
both_modes = pytest.mark.parametrize("mode", ["recompute", "swap"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SharedCase]:
    return {name: SharedCase(name, tmp_path_factory.mktemp(name), NEW_TOKENS) for name in MODELS}


def total(case: SharedCase) -> int:
    return sum(map(len, case.prompts))


# ---------------------------------------------------------------------- block size x chunk size x cache x backend


@each_family
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
@pytest.mark.parametrize("budget", [7, 40, 2048])
def test_any_block_size_chunk_size_and_backend(
    name: str, backend: str, block_size: int, budget: int, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """And no prefix is computed twice, however the prompts are cut."""
    case = cases[name]
    llm = case.llm(
        block_size=block_size,
        num_kv_blocks=max(12, 1200 // block_size),
        max_num_batched_tokens=budget,
        attention_backend=backend,
    )
    case.check(llm, oracle_stats)
    stats = llm.engine.stats
    assert stats.prompt_tokens_computed == case.computed_at_least(block_size)
    assert stats.prompt_tokens_computed + stats.cached_tokens == total(case)
    assert (stats.cached_tokens > 0) == (block_size < 256)
    assert (stats.prefill_chunks > len(SHAPES)) == (budget < total(case))
    forget_nothing(llm)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("budget", [24, 2048])
def test_the_model_of_the_course_in_chunks(
    block_size: int, budget: int, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    case = cases["folo-tiny"]
    llm = case.llm(block_size=block_size, max_num_batched_tokens=budget)
    case.check(llm, oracle_stats)
    assert llm.engine.stats.prompt_tokens_computed == case.computed_at_least(block_size)


@each_family
def test_a_step_of_one_token(name: str, cases: dict[str, SharedCase], oracle_stats: OracleStats) -> None:
    """One request after the other, token by token: each computed alone, at the end of K/V of others."""
    case = cases[name]
    llm = case.llm(block_size=4, max_num_batched_tokens=1)
    case.check(llm, oracle_stats)
    assert all(step.num_scheduled_tokens == 1 for step in llm.engine.trace)


@each_family
@pytest.mark.parametrize("settings", [
    {"enable_prefix_caching": False, "max_num_batched_tokens": 11},
    {"enable_chunked_prefill": False},
    {"enable_chunked_prefill": False, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 5},
    {"max_num_batched_tokens": 30, "max_num_seqs": 3},
], ids=str)  # fmt: skip
def test_with_and_without_each_of_the_two(
    name: str, settings: dict[str, Any], cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    case = cases[name]
    llm = case.llm(block_size=8, **settings)
    case.check(llm, oracle_stats)
    stats, caching = llm.engine.stats, settings.get("enable_prefix_caching", True)
    assert (stats.cached_tokens > 0) == caching
    assert stats.prompt_tokens_computed == (case.computed_at_least(8) if caching else total(case))
    chunked = settings.get("enable_chunked_prefill", True)
    assert (stats.prefill_chunks > len(SHAPES)) == chunked


@each_model
def test_all_milestones_say_the_same(name: str, cases: dict[str, SharedCase], oracle_stats: OracleStats) -> None:
    """Not by way of Hugging Face: sharers say what they say at M1 to M3, where nobody shares anything."""
    case = cases[name]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    settings: list[tuple[str, dict[str, Any]]] = [
        ("m4", {"max_num_batched_tokens": 32}),
        ("m4", {}),
        ("m4", {"enable_prefix_caching": False, "max_num_batched_tokens": 32}),
        ("m3", {}),
        ("m2", {}),
        ("m1", {}),
    ]
    engines = [case.llm(milestone, **kwargs) for milestone, kwargs in settings]
    runs = [llm.generate(case.prompts, params, use_tqdm=False) for llm in engines]
    assert [llm.engine.stats.cached_tokens > 0 for llm in engines] == [True, True, False, False, False, False]
    for run in runs[1:]:
        for ours, theirs, prompt in zip(runs[0], run, case.prompts, strict=True):
            one, other = ours.outputs[0], theirs.outputs[0]
            assert_same_tokens(one.token_ids, other.token_ids, case.model, prompt, oracle_stats)
            if one.token_ids == other.token_ids:
                assert one.cumulative_logprob is not None and other.cumulative_logprob is not None
                assert abs(one.cumulative_logprob - other.cumulative_logprob) < 1e-3


# ---------------------------------------------------------------------- what stays in the cache


@each_model
def test_a_second_time_all_but_the_last_blocks_are_found(
    name: str, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """K/V that was written steps ago, in other batches, by requests that are gone."""
    case = cases[name]
    llm = case.llm(block_size=4, max_num_batched_tokens=64)
    case.check(llm, oracle_stats)
    llm.engine.stats.reset()
    case.check(llm, oracle_stats)
    assert llm.engine.stats.cached_tokens == sum((len(prompt) - 1) // 4 * 4 for prompt in case.prompts)
    llm.reset_prefix_cache()
    llm.engine.stats.reset()
    case.check(llm, oracle_stats)
    assert llm.engine.stats.prompt_tokens_computed == case.computed_at_least(4)


@each_model
def test_a_conversation_goes_on_from_its_own_answers(
    name: str, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """Each turn's prompt is all that was said before, and one token more: K/V of output tokens is used again."""
    case = cases[name]
    llm, alone = case.llm(block_size=4), case.llm("m1")
    prompt = case.prompts[2]
    for turn in range(4):
        ours, theirs = (x.generate([prompt], case.params, use_tqdm=False)[0] for x in (llm, alone))
        assert_same_tokens(ours.outputs[0].token_ids, theirs.outputs[0].token_ids, case.model, prompt, oracle_stats)
        assert ours.num_cached_tokens == ((len(prompt) - 2) // 4 * 4 if turn else 0) and theirs.num_cached_tokens == 0
        prompt = [*prompt, *theirs.outputs[0].token_ids, 7 + turn]


@each_family
@pytest.mark.parametrize("num_kv_blocks", [17, 24])
def test_blocks_that_are_evicted_all_the_time(
    name: str, num_kv_blocks: int, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """Three rounds through a pool for one prompt or two: what is found is what is really there."""
    case = cases[name]
    llm = case.llm(block_size=4, num_kv_blocks=num_kv_blocks, max_num_batched_tokens=16)
    for _ in range(3):
        case.check(llm, oracle_stats)
    assert 0 < llm.engine.stats.cached_tokens < 2 * total(case)


def test_a_sliding_window_shares_nothing_wrong(cases: dict[str, SharedCase], oracle_stats: OracleStats) -> None:
    """Mistral's window is 8 tokens. A prefix of 48 is shared all the same, and what is long out of the window with it:
    two prompts with the same last 8 tokens of a prefix and another beginning share nothing, since K/V of the second
    layer knows of tokens before the window."""
    case = cases["mistral"]
    assert case.model.config.sliding_window == 8
    llm = case.llm(block_size=8, max_num_batched_tokens=24)
    case.check(llm, oracle_stats)
    first, second = case.prompts[0], list(case.prompts[0])
    second[0] = (second[0] + 1) % 128
    alone = case.llm("m1")
    for prompt, cached in ((first, 48), (second, 0), (second, 48)):
        ours, theirs = (x.generate([prompt], case.params, use_tqdm=False)[0] for x in (llm, alone))
        assert_same_tokens(ours.outputs[0].token_ids, theirs.outputs[0].token_ids, case.model, prompt, oracle_stats)
        assert ours.num_cached_tokens == cached


def test_a_salt_changes_what_is_found_and_not_what_is_said(
    cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    case = cases["qwen3"]
    llm = case.llm(block_size=8, max_num_batched_tokens=32)
    prompts: Any = [
        {"prompt_token_ids": prompt, "cache_salt": salt} for salt in ("", "a", "b") for prompt in case.prompts
    ]
    outputs = llm.generate(prompts, case.params, use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    for i in range(3):
        case.compare(tokens[len(SHAPES) * i :][: len(SHAPES)], oracle_stats)
    assert llm.engine.stats.prompt_tokens_computed == 3 * case.computed_at_least(8)


# ---------------------------------------------------------------------- in pools that are too small


@each_family
@both_modes
@pytest.mark.parametrize(("block_size", "budget"), [(1, 16), (4, 9), (4, 64), (16, 30)])
def test_who_gives_way_comes_back_with_the_same_tokens(
    name: str, mode: str, block_size: int, budget: int, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    case = cases[name]
    llm = case.llm(
        block_size=block_size,
        num_kv_blocks=-(-72 // block_size) + 1,
        max_num_batched_tokens=budget,
        preemption_mode=mode,
        swap_space=0.01,
    )
    case.check(llm, oracle_stats)
    stats = llm.engine.stats
    assert stats.preemptions > 0 and stats.cached_tokens > 0
    assert (stats.swapped_in_blocks > 0) == (mode == "swap") and stats.swapped_in_blocks == stats.swapped_out_blocks
    forget_nothing(llm)


@pytest.mark.parametrize("name", ["folo-tiny", "llama"])
@both_modes
@pytest.mark.parametrize("policy", ["sjf", "priority"])
def test_under_every_policy(
    name: str, mode: str, policy: str, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    case = cases[name]
    llm = case.llm(
        block_size=4,
        num_kv_blocks=20,
        max_num_batched_tokens=13,
        preemption_mode=mode,
        swap_space=0.01,
        scheduling_policy=policy,
        attention_backend="reference",
    )
    case.check(llm, oracle_stats, [i % 3 for i in range(len(SHAPES))] if policy == "priority" else 0)
    assert llm.engine.stats.preemptions > 0


@each_family
def test_requests_that_come_while_others_run(
    name: str, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """Chunks, followers and decodes of different requests in one forward."""
    case = cases[name]
    llm = case.llm(block_size=4, num_kv_blocks=30, max_num_batched_tokens=12, long_prefill_token_threshold=8)
    waiting, done = list(enumerate(case.prompts)), {}
    followed = 0
    while waiting or llm.engine.has_unfinished_requests():
        if waiting and len(llm.engine.trace) % 2 == 0:
            index, prompt = waiting.pop(0)
            llm.engine.add_request(str(index), prompt, case.params)
        for output in llm.engine.step():
            if output.finished:
                done[int(output.request_id)] = output.outputs[0].token_ids
        followed += len(llm.engine.core.scheduler._followers)
        manager_of(llm.engine).check()
    case.compare([done[i] for i in range(len(SHAPES))], oracle_stats)
    assert followed > 0 and llm.engine.stats.cached_tokens > 0
    assert any(0 < step.num_prefills < len(step.requests) for step in llm.engine.trace)
    check_all_free(llm.engine)


# ---------------------------------------------------------------------- samples and beams


@each_model
@pytest.mark.parametrize("num_kv_blocks", [24, 300])
def test_samples_of_cached_prompts_are_what_each_seed_gives_alone(
    name: str, num_kv_blocks: int, cases: dict[str, SharedCase]
) -> None:
    case = cases[name]
    wishes: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.95, "ignore_eos": True}
    prompts = [case.prompts[0], case.prompts[4], case.prompts[1]]
    llm = case.llm(block_size=4, num_kv_blocks=num_kv_blocks, max_num_batched_tokens=20)
    shared = llm.generate(prompts, SamplingParams(n=3, seed=11, **wishes), use_tqdm=False)
    stats = llm.engine.stats
    assert stats.cached_tokens > 0 and stats.copied_blocks > 0 and (stats.preemptions > 0) == (num_kv_blocks == 24)
    check_all_free(llm.engine)
    seeds = [SamplingParams(seed=11 + i, **wishes) for i in range(3)]
    for prompt, output in zip(prompts, shared, strict=True):
        alone = case.llm("m1").generate([prompt] * 3, seeds, use_tqdm=False)
        assert [c.token_ids for c in output.outputs] == [o.outputs[0].token_ids for o in alone]


def test_penalties_and_minimum_lengths_do_not_mind(cases: dict[str, SharedCase]) -> None:
    """They look at prompt and output, also at those tokens of a prompt that were never computed."""
    case = cases["qwen3"]
    params = SamplingParams(
        temperature=0.7, seed=5, max_tokens=12, min_tokens=10, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=3
    )
    llm = case.llm(block_size=4, num_kv_blocks=24, max_num_batched_tokens=10)
    ours = llm.generate(case.prompts, params, use_tqdm=False)
    theirs = case.llm("m2").generate(case.prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in theirs]
    assert llm.engine.stats.cached_tokens > 0 and llm.engine.stats.preemptions > 0


@pytest.mark.parametrize(
    ("family", "eos", "settings"),
    [
        ("qwen3", "one", {}),
        ("mistral", "one", {"block_size": 4, "max_num_batched_tokens": 7}),
        ("llama", "many", {"block_size": 4, "num_kv_blocks": 14, "max_num_batched_tokens": 16}),
        ("qwen2", "none", {"block_size": 1, "num_kv_blocks": 60, "preemption_mode": "swap", "swap_space": 0.01}),
    ],
)
def test_beams_are_hugging_faces_the_first_time_and_the_second(
    family: str, eos: str, settings: dict[str, Any], tmp_path: Path, oracle_stats: OracleStats
) -> None:
    """The second search finds what the first has left. Beams that are let go leave cached blocks behind."""
    case = Searched(family, EOS_SETS[eos], tmp_path)
    llm = LLM(case.path, milestone="m4", dtype="float32", device="cpu", **{"num_kv_blocks": 400, **settings})
    search = (4, 12, 1.0)
    for _ in range(2):
        outputs = llm.beam_search(PROMPTS, BeamSearchParams(4, 12))
        check_beams(outputs, case.beams(*search), oracle_stats)
        check_all_free(llm.engine)
        forget_nothing(llm)
    assert llm.engine.stats.cached_tokens > 0


def test_beams_keep_the_salt_of_their_prompt(tmp_path: Path) -> None:
    """Neither the prompt nor what the beams say is found by anybody else."""
    case = Searched("qwen3", [], tmp_path)
    llm = LLM(case.path, dtype="float32", device="cpu", num_kv_blocks=200, block_size=2)
    prompt = list(range(9))
    (salted,) = llm.beam_search([{"prompt_token_ids": prompt, "cache_salt": "mine"}], BeamSearchParams(2, 6))
    said = salted.sequences[0].tokens
    params = SamplingParams(temperature=0, max_tokens=1)
    for salt, cached in (("", 0), ("yours", 0), ("mine", len(said) - 2)):
        (output,) = llm.generate([{"prompt_token_ids": said, "cache_salt": salt}], params, use_tqdm=False)
        assert (output.num_cached_tokens >= cached) if salt == "mine" else output.num_cached_tokens == 0
