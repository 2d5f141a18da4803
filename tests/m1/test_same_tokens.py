"""Promise 1 at M1: greedy output in float32 is Hugging Face `generate`'s, token by token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import load_prose
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

NUM_PROMPTS = 60


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu")


def seeded_prompts(tokenizer: PreTrainedTokenizerBase, vocab_size: int, count: int) -> list[list[int]]:
    """Prompts of lengths 1 to 300: every second one a cut of the bundled prose, the others random ids."""
    rng = random.Random(7)
    prose = tokenizer("\n\n".join(load_prose().values()))["input_ids"]
    prompts = []
    for i in range(count):
        length = 1 + i * 299 // (count - 1)
        start = rng.randrange(len(prose) - length)
        cut = list(prose[start : start + length])
        prompts.append(cut if i % 2 else [rng.randrange(vocab_size) for _ in range(length)])
    return prompts


def test_folo_tiny_on_prompts_of_1_to_300_tokens(llm: LLM, oracle_stats: OracleStats) -> None:
    model: PreTrainedModel = llm.engine.core.runner.model
    prompts = seeded_prompts(llm.engine.tokenizer, llm.engine.vocab_size, NUM_PROMPTS)
    assert {len(p) for p in prompts} >= {1, 300} and len(prompts) == NUM_PROMPTS
    before = llm.engine.stats.generated_tokens
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    produced = sum(len(o.outputs[0].token_ids) for o in outputs)
    assert llm.engine.stats.generated_tokens - before == produced > NUM_PROMPTS
    for prompt, output in zip(prompts, outputs, strict=True):
        reference = hf_greedy(model, prompt, 16, eos=llm.engine.eos_token_ids)
        assert_same_tokens(output.outputs[0].token_ids, reference, model, prompt, oracle_stats)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_families(family: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Random weights, written and loaded as a checkpoint: Llama-3 RoPE scaling and a window of 8 tokens included."""
    model = tiny_model(family, seed=3)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone="m1", dtype="float32", device="cpu")
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 7, 8, 9, 33, 100, 200)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 24), model, prompt, oracle_stats)


def test_eos_ends_an_output_where_hugging_face_ends_it(tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Random weights reach an EOS soon if many ids are one: all of generation_config's list must count."""
    model = tiny_model("qwen3", seed=5)
    eos = list(range(0, 128, 9))
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone="m1", dtype="float32", device="cpu")
    prompts = [random_prompt(length, seed=100 + length) for length in range(1, 21)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    stopped = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        assert_same_tokens(completion.token_ids, hf_greedy(model, prompt, 32, eos=eos), model, prompt, oracle_stats)
        ended = completion.token_ids[-1] in eos
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.stop_reason is None
        stopped += ended
    assert stopped >= 10


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_samples_of_a_prompt_are_what_each_seed_gives_alone(family: str, tmp_path: Path) -> None:
    """n = 3 computes the prompt three times here; each sample must equal a request of its own with seed + index."""
    tiny_model(family, seed=3).save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone="m1", dtype="float32", device="cpu")
    prompt = random_prompt(40, seed=1)
    shared = llm.generate([prompt], SamplingParams(n=3, seed=11, max_tokens=20), use_tqdm=False)[0]
    assert llm.engine.stats.prompt_tokens_computed == 3 * 40
    alone = [
        llm.generate([prompt], SamplingParams(seed=11 + i, max_tokens=20), use_tqdm=False)[0].outputs[0]
        for i in range(3)
    ]
    assert [c.token_ids for c in shared.outputs] == [c.token_ids for c in alone]
    assert [c.index for c in shared.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in shared.outputs}) == 3
    assert len(llm.engine.core.runner.states) == 0
