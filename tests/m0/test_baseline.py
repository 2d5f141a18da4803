"""M0's two loops against Hugging Face `generate`, counted FLOPs, and what each step feeds the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, PreTrainedModel

from folovllm import baseline
from folovllm.baseline import (
    BaselineResult,
    choose_token,
    generate_cached,
    generate_recompute,
)
from folovllm.course.lessons.baseline_report import compare
from folovllm.kv_cache.formulas import kv_bytes
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

LOOPS = pytest.mark.parametrize("generate", [generate_recompute, generate_cached])
Generate = Callable[..., BaselineResult]


@functools.cache
def shared_model(family: str) -> PreTrainedModel:
    return tiny_model(family)


def spy_on_inputs(model: PreTrainedModel) -> tuple[list[dict[str, Any]], Any]:
    """Record the keyword arguments of every forward; the second value's `remove()` ends it."""
    calls: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls, handle


# --- same tokens -----------------------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("prompt_len", [1, 2, 7, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_equals_hf_generate(
    family: str, prompt_len: int, generate: Generate, oracle_stats: OracleStats
) -> None:
    model, prompt = shared_model(family), random_prompt(prompt_len, seed=prompt_len)
    result = generate(model, prompt, max_new_tokens=24)
    assert len(result.token_ids) == 24
    assert_same_tokens(result.token_ids, hf_greedy(model, prompt, 24), model, prompt, oracle_stats)


@LOOPS
def test_eos_ends_the_text_and_is_part_of_it(generate: Generate) -> None:
    model, prompt = shared_model("qwen3"), random_prompt(5)
    free = hf_greedy(model, prompt, 16)
    eos = [free[6], free[9]]
    stopped = hf_greedy(model, prompt, 16, eos=eos)
    assert 1 < len(stopped) < 16
    result = generate(model, prompt, 16, eos_token_ids=eos)
    assert result.token_ids == stopped
    assert generate(model, prompt, 16, eos_token_ids=iter(free[:1])).token_ids == free[:1]


@LOOPS
def test_eos_in_the_prompt_does_not_stop(generate: Generate) -> None:
    model, prompt = shared_model("qwen3"), random_prompt(5)
    free = hf_greedy(model, prompt, 8)
    eos = [token for token in prompt if token not in free]
    assert eos
    assert generate(model, prompt, 8, eos_token_ids=eos).token_ids == free


@LOOPS
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampled_tokens_equal_hf_with_the_same_seed(generate: Generate, temperature: float) -> None:
    """HF draws from torch's global CPU generator; seeded alike, it is the same stream of random numbers."""
    model, prompt = shared_model("llama"), random_prompt(6)
    settings = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=20, pad_token_id=0
    )
    torch.manual_seed(1234)
    expected = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
    assert expected != hf_greedy(model, prompt, 20)
    assert generate(model, prompt, 20, temperature=temperature, seed=1234).token_ids == expected


@LOOPS
def test_the_seed_decides_and_no_seed_differs(generate: Generate) -> None:
    model, prompt = shared_model("llama"), random_prompt(6)
    sample = functools.partial(generate, model, prompt, 20, temperature=3.0)
    texts = [sample(seed=1), sample(seed=2), sample(seed=None), sample(seed=None)]
    assert len({tuple(text.token_ids) for text in texts}) == 4


def test_draws_follow_softmax_of_logits_over_temperature() -> None:
    logits, temperature, draws = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0]), 1.7, 4000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[choose_token(logits, temperature, generator)] += 1
    weights = [2.718281828459045 ** (x / temperature) for x in logits.tolist()]
    expected = [draws * w / sum(weights) for w in weights]
    assert chisquare(counts.tolist(), expected).pvalue > 0.01


# --- what each step feeds --------------------------------------------------------------------------------


def test_first_decode_position_is_the_prompt_length() -> None:
    model, prompt = tiny_model("qwen2"), random_prompt(7)
    calls, _ = spy_on_inputs(model)
    new = generate_cached(model, prompt, 4).token_ids
    assert [call["position_ids"].tolist() for call in calls] == [[list(range(7))], [[7]], [[8]], [[9]]]
    assert [call["input_ids"].tolist() for call in calls] == [[prompt], [new[:1]], [new[1:2]], [new[2:3]]]


def test_recompute_feeds_the_whole_text_each_time_and_keeps_no_cache() -> None:
    model, prompt = tiny_model("qwen2"), random_prompt(3)
    calls, _ = spy_on_inputs(model)
    new = generate_recompute(model, prompt, 3).token_ids
    texts = [prompt, prompt + new[:1], prompt + new[:2]]
    assert [call["input_ids"].tolist() for call in calls] == [[text] for text in texts]
    assert [call["position_ids"].tolist() for call in calls] == [[list(range(n))] for n in (3, 4, 5)]
    assert not any(call["use_cache"] for call in calls)


@LOOPS
def test_only_the_last_position_meets_the_lm_head(generate: Generate) -> None:
    model, shapes = tiny_model("qwen2"), []
    model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    generate(model, random_prompt(7), 3)
    assert shapes == [(1, 1, 128)] * 3


@LOOPS
def test_the_clock_covers_the_forward_and_not_the_callback(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = 0.0, []

    def forward_takes_one_second(*_: object) -> None:
        nonlocal now
        now += 1.0

    def callback_takes_a_hundred(token: int) -> None:
        nonlocal now
        now += 100.0
        seen.append(token)

    model = tiny_model("qwen2")
    model.register_forward_hook(forward_takes_one_second)
    monkeypatch.setattr(baseline, "time", SimpleNamespace(perf_counter=lambda: now))
    result = generate(model, random_prompt(4), 5, on_token=callback_takes_a_hundred)
    assert result.token_times == [1.0] * 5
    assert seen == result.token_ids


@LOOPS
def test_no_new_tokens_means_no_forward(generate: Generate) -> None:
    model = tiny_model("qwen2")
    calls, _ = spy_on_inputs(model)
    result = generate(model, [1, 2], 0)
    assert result == BaselineResult(prompt_len=2, token_ids=[], token_times=[], kv_bytes=0)
    assert not calls


# --- bytes and FLOPs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "dtype_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_cache_holds_all_tokens_but_the_last(family: str, dtype: torch.dtype, dtype_bytes: int) -> None:
    model = tiny_model(family, dtype=dtype)
    expected = kv_bytes(model.config, 9 + 6 - 1, dtype_bytes)
    assert generate_cached(model, random_prompt(9), 6).kv_bytes == expected
    assert generate_recompute(model, random_prompt(9), 6).kv_bytes == 0


def test_sliding_window_cache_holds_one_token_less_than_the_window() -> None:
    model = shared_model("mistral")
    assert generate_cached(model, random_prompt(9), 6).kv_bytes == kv_bytes(model.config, 8 - 1, 4)


@pytest.mark.parametrize(("prompt_len", "n"), [(1, 1), (1, 12), (11, 9)])
@pytest.mark.parametrize("family", FAMILIES)
def test_report_states_the_flops_that_torch_counts(family: str, prompt_len: int, n: int) -> None:
    """torch counts the matrix products of both loops as they run; the report derives them from the config."""
    model = tiny_model(family, sliding_window=20) if family == "mistral" else tiny_model(family)
    model.set_attn_implementation("eager")  # its attention is two plain matrix products, which torch counts
    counted, results = [], []
    for generate in (generate_recompute, generate_cached):
        with FlopCounterMode(display=False) as counter:
            results.append(generate(model, random_prompt(prompt_len), n))
        per_module = counter.get_flop_counts()
        rope = sum(sum(v.values()) for name, v in per_module.items() if name.endswith("rotary_emb"))
        counted.append(counter.get_total_flops() - rope)  # RoPE's angles are a small outer product
    report = compare(model.config, *results)
    assert [report.flops_recompute.total, report.flops_cached.total] == counted
    assert report.flop_ratio == counted[0] / counted[1]


def test_report_of_known_results() -> None:
    config = shared_model("qwen2").config
    recompute = BaselineResult(prompt_len=3, token_ids=[5, 6, 7], token_times=[1.0, 2.0, 3.0])
    cached = BaselineResult(prompt_len=3, token_ids=[5, 6, 7], token_times=[1.0, 0.25, 0.25], kv_bytes=80)
    report = compare(config, recompute, cached)
    assert (report.same_tokens, report.prompt_len, report.new_tokens, report.kv_bytes) == (True, 3, 3, 80)
    assert report.time_ratio == 4.0


def test_report_compares_the_same_work_when_one_text_ended_earlier() -> None:
    config = shared_model("qwen2").config
    recompute = BaselineResult(prompt_len=3, token_ids=[5, 6, 7], token_times=[1.0, 2.0, 3.0])
    cached = BaselineResult(prompt_len=3, token_ids=[5, 9], token_times=[1.0, 0.5])
    report = compare(config, recompute, cached)
    assert (report.same_tokens, report.new_tokens, report.time_ratio) == (False, 2, 2.0)
    both_two = compare(config, BaselineResult(3, [5, 6], [1.0, 2.0]), cached)
    assert report.flop_ratio == both_two.flop_ratio


def test_report_refuses_different_prompts_and_empty_texts() -> None:
    config = shared_model("qwen2").config
    result = BaselineResult(3, [1], [1.0])
    with pytest.raises(ValueError, match="prompts of 3 and 4"):
        compare(config, result, BaselineResult(4, [1], [1.0]))
    with pytest.raises(ValueError, match="0 new tokens"):
        compare(config, result, BaselineResult(3, [], []))


# --- bad input -------------------------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": [1, 128]}, "holds 128: allowed are 0 to 127"),
        ({"prompt_token_ids": [-1]}, "holds -1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 255}, "need 257 positions: the model has 256"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": 0.001}, "temperature=0.001: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_bad_arguments_are_refused(generate: Generate, arguments: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {"prompt_token_ids": [1, 2], "max_new_tokens": 1}
    with pytest.raises(ValueError, match=message):
        generate(shared_model("qwen2"), **(fine | arguments))


@LOOPS
def test_a_rotation_that_changes_with_the_length_is_refused_beyond_it(generate: Generate) -> None:
    """Its cached keys were rotated in the short way. Recomputed ones are not, so the two loops would disagree."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 8.0}
    model = tiny_model("llama", rope_parameters=rope, original_max_position_embeddings=32)
    prompt = random_prompt(28)
    assert len(generate(model, prompt, 4).token_ids) == 4
    with pytest.raises(ValueError, match=r"'longrope'.*allowed: at most 32"):
        generate(model, prompt, 5)


@LOOPS
def test_the_models_last_position_can_be_used(generate: Generate, oracle_stats: OracleStats) -> None:
    model, prompt = shared_model("llama"), random_prompt(250)
    assert_same_tokens(generate(model, prompt, 6).token_ids, hf_greedy(model, prompt, 6), model, prompt, oracle_stats)
