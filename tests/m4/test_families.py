"""Every family of Hugging Face decoders at every milestone, as `results/families.json` and the page on families say.

The oracle is `generate` of each prompt alone. A refusal is right if it comes before any request, and if what it
recommends is true.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.config import MILESTONES
from folovllm.course.measure.families import (
    EXPERTS,
    FAMILIES,
    GQA,
    MLA,
    NEW_TOKENS,
    OTHER,
    PROMPTS,
    SAME,
    build,
    served,
)
from folovllm.course.paths import RESULTS
from folovllm.kv_cache.formulas import held_bytes_per_token
from folovllm.runner.hf.hf_runner import HFRunner
from folovllm.runner.paged_runner import PagedRunner
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt

TABLE: dict[str, dict[str, str]] = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))["families"]
COMPARED = 60  # letters of a refusal: its numbers come later
each_milestone = pytest.mark.parametrize("milestone", MILESTONES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def check_same(llm: LLM, model: PreTrainedModel, lengths: tuple[int, ...], stats: OracleStats, new: int = 8) -> None:
    """All prompts together have the tokens of each alone."""
    prompts = [random_prompt(n, seed=n) for n in lengths]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, new), model, prompt, stats)


def make(folder: Path, milestone: str, **kwargs: Any) -> LLM:
    if MILESTONES[milestone].paged:
        kwargs = {"num_kv_blocks": 64, "block_size": 4, **kwargs}
    return LLM(str(folder), milestone=milestone, dtype="float32", device="cpu", **kwargs)


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_table_says(name: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    expected = [hf_greedy(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    for milestone in MILESTONES:
        found, told = served(tmp_path, milestone), TABLE[name][milestone]
        if isinstance(found, str):
            assert found[:COMPARED] == told[:COMPARED]
        else:
            assert told == SAME
            for prompt, ours, theirs in zip(PROMPTS, found, expected, strict=True):
                assert_same_tokens(ours, theirs, model, prompt, oracle_stats)


def test_the_table_is_of_these_families() -> None:
    assert TABLE.keys() == FAMILIES.keys(), "run: python -m folovllm.course.measure families"
    assert not [name for name, row in TABLE.items() if OTHER in row.values() or row.keys() != MILESTONES.keys()]
    assert sum(set(row.values()) == {SAME} for row in TABLE.values()) >= 70


@pytest.mark.parametrize("name", FAMILIES)
def test_a_refusal_recommends_what_runs_and_nothing_else(name: str) -> None:
    row = TABLE[name]
    runs = [milestone for milestone in MILESTONES if row[milestone] == SAME]
    for milestone in ("m3", "m4"):
        if row[milestone] != SAME:
            assert ("milestones m1 and m2 run it" in row[milestone]) == (runs == ["m1", "m2"])
            assert ("milestone m1 runs it" in row[milestone]) == (runs == ["m1"])
            no_one = "m1 and m2 cannot run it either" in row[milestone] or "at any milestone" in row[milestone]
            assert no_one == (not runs)
    if row["m2"] != SAME:
        assert ("or milestone m1" in row["m2"]) == (row["m1"] == SAME)


# ---------------------------------------------------------------------- a RoPE that looks at the longest request

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}


def long_rope(name: str) -> PreTrainedModel:
    numbers = 4 if name == "minicpm3" else 8
    rope = {**LONG_ROPE, "short_factor": [1 + 0.1 * i for i in range(numbers)], "long_factor": [4.0] * numbers}
    if name == "phimoe":
        rope |= {"short_mscale": 1.1, "long_mscale": 1.3}
    return build(name, original_max_position_embeddings=32, rope_parameters=rope)


@each_milestone
@pytest.mark.parametrize("name", ["phi3", "phimoe", "minicpm3", "llama"])
def test_long_rope_up_to_its_original_length(
    name: str, milestone: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    """Beyond it, one long request would change the tokens of all others, at whatever milestone."""
    model = long_rope(name)
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"max_model_len": 33}):
        with pytest.raises(ValueError, match=r"max_model_len=.*'longrope'.*allowed: at most 32, at every milestone"):
            make(tmp_path, milestone, **kwargs)
    check_same(make(tmp_path, milestone, max_model_len=32), model, (24, 4, 9), oracle_stats)


@each_milestone
@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear"])
@pytest.mark.parametrize("name", ["qwen2", "granite"])
def test_a_scaled_rope_beside_a_long_request(
    name: str, kind: str, milestone: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model = build(name, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    check_same(make(tmp_path, milestone), model, (120, 4, 12, 17), oracle_stats)


@each_milestone
def test_attention_that_is_scaled_by_position(milestone: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    model = build("ministral3", rope_parameters={**rope, "llama_4_scaling_beta": 0.5})
    model.save_pretrained(tmp_path)
    check_same(make(tmp_path, milestone), model, (60, 4, 12), oracle_stats)


# ---------------------------------------------------------------------- M1 and M2


@pytest.mark.parametrize("milestone", ["m1", "m2"])
@pytest.mark.parametrize(("name", "implementation"), [("gemma2", "eager"), ("gpt_oss", "eager"), ("gemma", "sdpa")])
def test_eager_attention_where_there_is_no_sdpa(
    name: str, implementation: str, milestone: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    """Right with padding in prefills and decodes, of requests that leave at different times."""
    model = build(name)
    model.save_pretrained(tmp_path)
    llm = make(tmp_path, milestone)
    runner = cast(HFRunner, llm.engine.core.runner)
    assert runner.model.config._attn_implementation == implementation
    check_same(llm, model, (1, 30, 7, 12, 60), oracle_stats)


def test_attention_that_selects_tokens_is_not_padded_beyond_them(tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Doge keeps a number of a row's columns, and columns of padding would be among them."""
    model = build("doge", keep_window_size=20)  # more than the texts of any check have
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"batching='padded' .*max_model_len=128 is above keep_window_size=20.*'loop'"):
        make(tmp_path, "m2")
    for llm in (make(tmp_path, "m1"), make(tmp_path, "m2", batching="loop")):
        check_same(llm, model, (40, 4, 22), oracle_stats)
    check_same(make(tmp_path, "m2", max_model_len=20), model, (12, 4, 9), oracle_stats)


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3", "minicpm3"])
def test_a_shared_prefix(name: str, backend: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Long enough for cascade attention: caps, sinks and two sizes, with the prefix read once for all requests."""
    model = build(name)
    model.save_pretrained(tmp_path)
    llm = make(tmp_path, "m4", attention_backend=backend, num_kv_blocks=200)
    prefix, params = random_prompt(80), SamplingParams(temperature=0, max_tokens=8)
    prompts = [prefix + random_prompt(n, seed=n) for n in (3, 9, 17)]
    llm.generate([prefix], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert output.num_cached_tokens == 80
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 8), model, prompt, oracle_stats)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v2", "deepseek_v3", "minicpm3", "gpt2"])
def test_bytes_from_a_config_are_those_of_the_pool(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    runner = make(tmp_path, "m4", num_kv_blocks=9).engine.core.runner
    assert isinstance(runner, PagedRunner)
    assert runner.storage.num_bytes == 10 * 4 * held_bytes_per_token(model.config, 4)


def test_a_block_holds_keys_and_values_in_their_sizes(tmp_path: Path) -> None:
    build("deepseek_v3").save_pretrained(tmp_path)
    runner = make(tmp_path, "m4", num_kv_blocks=9).engine.core.runner
    assert isinstance(runner, PagedRunner)
    layers, heads, key, value = 2, MLA["num_key_value_heads"], 8 + 16, 12
    assert runner.storage.num_bytes == 10 * layers * 4 * heads * (key + value) * 4
    assert runner.storage.layers[1].values.shape == (10, 4, heads, value)


def test_a_shape_of_experts_and_windows_is_what_it_says() -> None:
    """The table would prove little if a family were built without what it has of its own."""
    assert build("gpt_oss").config.layer_types == ["sliding_attention", "full_attention"]
    assert build("deepseek_v3").config.first_k_dense_replace == 1
    assert FAMILIES["mixtral"]["num_local_experts"] == EXPERTS["num_local_experts"] and FAMILIES["phi3"] == GQA
