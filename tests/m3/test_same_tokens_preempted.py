"""Promise 1 under preemption: in pools so small that most requests give way, in both modes, the tokens stay the same.

`stats` proves that it happened, and after every run every block is free, on the device and on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from folovllm import LLM, SamplingParams
from tests.m3.cases import MODELS, Case
from tests.m3.helpers import check_all_free
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

LENGTHS = (3, 12, 5, 10, 7, 8, 12, 4)
NEW_TOKENS = 32
LONGEST = max(LENGTHS) + NEW_TOKENS
each_model = pytest.mark.parametrize("name", MODELS)
both_modes = pytest.mark.parametrize("mode", ["recompute", "swap"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(name, tmp_path_factory.mktemp(name), LENGTHS, NEW_TOKENS, ignore_eos=True) for name in MODELS}


def victims(llm: LLM) -> set[str]:
    return {i for step in llm.engine.trace for i in step.preempted}


def check_stats(llm: LLM, mode: str) -> None:
    """More than half of the requests gave way, and only swapping swaps."""
    stats = llm.engine.stats
    assert len(victims(llm)) > len(LENGTHS) / 2 and stats.preemptions >= len(victims(llm))
    assert (stats.swapped_out_blocks > 0) == (mode == "swap")
    assert stats.swapped_in_blocks == stats.swapped_out_blocks
    prompt_tokens = sum(LENGTHS)
    assert stats.generated_tokens == len(LENGTHS) * NEW_TOKENS  # nothing is sampled twice
    assert (stats.prompt_tokens_computed > prompt_tokens) == (mode == "recompute")


# Each family meets both modes, and so does each block size.
MODES = ("recompute", "swap")
SMALL_POOLS = [("folo-tiny", 16, mode) for mode in MODES] + [
    (family, size, MODES[(i + j) % 2]) for i, family in enumerate(FAMILIES) for j, size in enumerate((1, 8, 16, 32))
]


@pytest.mark.parametrize(("name", "block_size", "mode"), SMALL_POOLS)
def test_in_a_pool_that_hardly_holds_one_of_them(
    name: str, block_size: int, mode: str, cases: dict[str, Case], oracle_stats: OracleStats
) -> None:
    num_blocks = max(-(-LONGEST // block_size), 3)  # two blocks of 32 would hold two until one is done
    llm = cases[name].llm(block_size=block_size, num_kv_blocks=num_blocks, preemption_mode=mode, swap_space=0.01)
    cases[name].check(llm, oracle_stats)
    check_stats(llm, mode)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@both_modes
@pytest.mark.parametrize("policy", ["sjf", "priority"])
def test_under_every_policy_with_either_backend(
    name: str, mode: str, policy: str, cases: dict[str, Case], oracle_stats: OracleStats
) -> None:
    backend = "reference" if policy == "sjf" else "torch"
    llm = cases[name].llm(
        block_size=4,
        num_kv_blocks=14,
        preemption_mode=mode,
        swap_space=0.01,
        scheduling_policy=policy,
        attention_backend=backend,
    )
    priority = [i % 3 for i in range(len(LENGTHS))] if policy == "priority" else 0
    cases[name].check(llm, oracle_stats, priority)
    check_stats(llm, mode)


@both_modes
def test_blocks_of_256(mode: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """A second block is needed after 256 tokens only, so these prompts are long. All start, and one can go on."""
    model = tiny_model("qwen2", seed=3, max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    llm = LLM(
        str(tmp_path),
        milestone="m3",
        dtype="float32",
        device="cpu",
        block_size=256,
        num_kv_blocks=3,
        preemption_mode=mode,
        swap_space=0.01,
    )
    prompts = [random_prompt(n, seed=n) for n in (250, 252, 249)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 16), model, prompt, oracle_stats)
    assert len(victims(llm)) == 2 and (llm.engine.stats.swapped_in_blocks > 0) == (mode == "swap")
    check_all_free(llm.engine)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_longer_than_a_step_they_catch_up_in_pieces(
    name: str, cases: dict[str, Case], oracle_stats: OracleStats
) -> None:
    """A prompt fits a step of 12 tokens. With its output it does not, so its K/V is computed in chunks."""
    llm = cases[name].llm(block_size=4, num_kv_blocks=14, max_num_batched_tokens=12)
    cases[name].check(llm, oracle_stats)
    unsampled = [r for step in llm.engine.trace for r in step.requests if not r.num_sampled]
    assert len(unsampled) > 2 and any(r.num_scheduled > 1 for r in unsampled)
    check_stats(llm, "recompute")


@each_model
def test_samples_with_seeds_are_what_each_seed_gives_alone(name: str, cases: dict[str, Case]) -> None:
    """Six samples in a pool for less than two. Alone, and at M1, each seed gives the same: it goes on."""
    case = cases[name]
    prompt = [token for prompt in case.prompts for token in prompt][:30]  # 7 whole blocks, and one that is copied
    wishes = {"max_tokens": 16, "temperature": 0.8, "top_p": 0.95, "ignore_eos": True}
    seeds = [SamplingParams(seed=11 + i, **wishes) for i in range(6)]
    m3, m1 = (
        [o.outputs[0].token_ids for o in llm.generate([prompt] * 6, seeds, use_tqdm=False)]
        for llm in (case.llm(), case.llm("m1"))
    )
    assert m3 == m1 and len(set(map(tuple, m1))) > 1
    for mode in MODES:
        llm = case.llm(block_size=4, num_kv_blocks=20, preemption_mode=mode, swap_space=0.01)
        shared = llm.generate([prompt], SamplingParams(n=6, seed=11, **wishes), use_tqdm=False)[0].outputs
        assert [c.token_ids for c in shared] == m1
        stats = llm.engine.stats
        assert stats.preemptions > 0 and stats.copied_blocks > 0
        assert (stats.swapped_in_blocks > 0) == (mode == "swap")
        check_all_free(llm.engine)


@both_modes
def test_penalties_and_minimum_lengths_survive(mode: str, cases: dict[str, Case]) -> None:
    """They look at the output so far, which a request that comes back must still know."""
    case = cases["qwen3"]
    params = SamplingParams(
        temperature=0.7, seed=5, max_tokens=24, min_tokens=20, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=3
    )
    small = case.llm(block_size=4, num_kv_blocks=12, preemption_mode=mode, swap_space=0.01)
    ours = small.generate(case.prompts, params, use_tqdm=False)
    assert len(victims(small)) > 4
    check_all_free(small.engine)
    theirs = case.llm().generate(case.prompts, params, use_tqdm=False)
    for one, other in zip(ours, theirs, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs is not None and len(one.outputs[0].logprobs) == len(one.outputs[0].token_ids)
