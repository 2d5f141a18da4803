"""Promise 1 at M4: in chunks of any size, with prefixes shared in blocks of any size, the tokens are Hugging Face's.

`stats` proves that chunks and hits really happened.
"""

from __future__ import annotations

from typing import Any

import pytest

from folovllm import SamplingParams
from tests.m3.cases import MODELS
from tests.m4.cases import SHAPES, SharedCase, forget_nothing
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens

each_model = pytest.mark.parametrize("name", MODELS)
each_family = pytest.mark.parametrize("name", FAMILIES)
BLOCK_SIZES, BUDGETS = (1, 4, 16, 256), (7, 40, 2048)


def total(case: SharedCase) -> int:
    return sum(map(len, case.prompts))


# ---------------------------------------------------------------------- block size x chunk size x cache x backend


@each_family
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_any_block_size_chunk_size_and_backend(
    name: str, block_size: int, budget: int, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """And no prefix is computed twice, however the prompts are cut. The backends take turns: any two of the four things
    that are chosen here meet in every way."""
    turn = FAMILIES.index(name) + BLOCK_SIZES.index(block_size) + BUDGETS.index(budget)
    backend = ("torch", "reference")[turn % 2]
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
    # With chunks shorter than a block all prompts run side by side before any block is full.
    shares = settings.get("enable_prefix_caching", True) and "long_prefill_token_threshold" not in settings
    stats = llm.engine.stats
    assert (stats.cached_tokens > 0) == shares
    assert stats.prompt_tokens_computed == (case.computed_at_least(8) if shares else total(case))
    chunked = settings.get("enable_chunked_prefill", True)
    assert (stats.prefill_chunks > len(SHAPES)) == chunked


@each_model
def test_all_milestones_say_the_same(name: str, cases: dict[str, SharedCase], oracle_stats: OracleStats) -> None:
    """Not by way of Hugging Face: sharers say what they say at M1 to M3, where nobody shares anything."""
    case = cases[name]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=1)
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
