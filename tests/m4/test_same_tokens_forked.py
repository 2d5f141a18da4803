"""Promise 1 at M4 where room is short or K/V is forked: preemption, samples, beams; chunks and shared prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, BeamSearchParams, SamplingParams
from tests.m3.cases import MODELS
from tests.m3.helpers import check_all_free, manager_of
from tests.m3.test_beam_search import EOS_SETS, PROMPTS, Searched, check_beams
from tests.m4.cases import SHAPES, SharedCase, forget_nothing
from tests.oracle import FAMILIES, OracleStats

each_model = pytest.mark.parametrize("name", MODELS)
each_family = pytest.mark.parametrize("name", FAMILIES)
SMALL_POOLS = [(1, 16), (4, 9), (4, 64), (16, 30)]  # block size and budget
both_modes = pytest.mark.parametrize("mode", ["recompute", "swap"])


# ---------------------------------------------------------------------- in pools that are too small


@each_family
@pytest.mark.parametrize(("block_size", "budget"), SMALL_POOLS)
def test_who_gives_way_comes_back_with_the_same_tokens(
    name: str, block_size: int, budget: int, cases: dict[str, SharedCase], oracle_stats: OracleStats
) -> None:
    """Each family is recomputed and swapped, and so is each way to cut prompts and blocks."""
    mode = ("recompute", "swap")[(FAMILIES.index(name) + SMALL_POOLS.index((block_size, budget))) % 2]
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


@pytest.mark.parametrize("name", ["qwen3", "llama"])
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
    """Chunks, decodes and prompts with a common prefix in one forward."""
    case = cases[name]
    llm = case.llm(block_size=4, num_kv_blocks=30, max_num_batched_tokens=12, long_prefill_token_threshold=8)
    waiting, done = list(enumerate(case.prompts)), {}
    while waiting or llm.engine.has_unfinished_requests():
        if waiting and len(llm.engine.trace) % 2 == 0:
            index, prompt = waiting.pop(0)
            llm.engine.add_request(str(index), prompt, case.params)
        for output in llm.engine.step():
            if output.finished:
                done[int(output.request_id)] = output.outputs[0].token_ids
        manager_of(llm.engine).check()
    case.compare([done[i] for i in range(len(SHAPES))], oracle_stats)
    assert llm.engine.stats.cached_tokens > 0
    assert any(0 < step.num_prefills < len(step.requests) for step in llm.engine.trace)
    check_all_free(llm.engine)


# ---------------------------------------------------------------------- samples and beams


@each_model
def test_samples_of_cached_prompts_are_what_each_seed_gives_alone(name: str, cases: dict[str, SharedCase]) -> None:
    """In a pool with room for all of them, and in one where they give way."""
    case = cases[name]
    wishes: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.95, "ignore_eos": True}
    prompts = [case.prompts[0], case.prompts[4], case.prompts[1]]
    seeds = [SamplingParams(seed=11 + i, **wishes) for i in range(3)]
    m1 = case.llm("m1")
    alone = [[o.outputs[0].token_ids for o in m1.generate([p] * 3, seeds, use_tqdm=False)] for p in prompts]
    for num_kv_blocks in (24, 300):
        llm = case.llm(block_size=4, num_kv_blocks=num_kv_blocks, max_num_batched_tokens=20)
        shared = llm.generate(prompts, SamplingParams(n=3, seed=11, **wishes), use_tqdm=False)
        stats = llm.engine.stats
        assert stats.cached_tokens > 0 and stats.copied_blocks > 0 and (stats.preemptions > 0) == (num_kv_blocks == 24)
        check_all_free(llm.engine)
        assert [[c.token_ids for c in output.outputs] for output in shared] == alone


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
