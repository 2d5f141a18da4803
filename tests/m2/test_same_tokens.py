"""Promise 1 at M2: whoever shares a step, every request's tokens are those that it has alone.

Hugging Face `generate`, one prompt at a time, is the reference. Requests of 1 to 200 tokens arrive while others run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import load_prose
from folovllm.outputs import RequestOutput
from tests.oracle import (
    FAMILIES,
    OracleStats,
    assert_same_tokens,
    float64_logits,
    hf_greedy,
    random_prompt,
    tiny_model,
)

Checkpoint = Callable[[str], str]
POLICIES = ("fcfs", "priority", "sjf")
MAX_NUM_SEQS = (1, 2, 5, 16)
LENGTHS = (7, 200, 1, 33, 8, 100, 2, 9, 60, 16, 1, 130)
MAX_TOKENS = [12 + i % 5 for i in range(len(LENGTHS))]
PROMPTS = [random_prompt(length, seed=10 * i + length) for i, length in enumerate(LENGTHS)]


def make_llm(path: str, milestone: str = "m2", **kwargs: Any) -> LLM:
    return LLM(path, milestone=milestone, dtype="float32", device="cpu", **kwargs)


def serve(llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """Half of the prompts are there at the start, then one comes in every step; outputs in their order."""
    engine, done = llm.engine, {}
    with_priorities = engine.config.scheduler.scheduling_policy == "priority"
    late = list(range(len(prompts)))

    def add_next() -> None:
        i = late.pop(0)
        engine.add_request(str(i), prompts[i], params[i], priority=-i % 3 if with_priorities else 0)

    while len(late) > len(prompts) // 2:
        add_next()
    while late or engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        if late:
            add_next()
    return [done[str(i)] for i in range(len(prompts))]


def check_forwards(llm: LLM, batching: str) -> None:
    """Batches were batches: one forward for all prefills of a step and one for all decodes; in the loop, one each."""
    stats, trace = llm.engine.stats, llm.engine.trace
    shares = sum(len(step.requests) for step in trace)
    if batching == "loop":
        assert stats.forwards == shares
        return
    kinds = [{r.num_computed == r.num_scheduled for r in step.requests} for step in trace]  # prefills, decodes
    assert stats.forwards == sum(len(k) for k in kinds) <= 2 * stats.steps
    assert stats.forwards < shares or stats.max_running == 1


@cache
def family_model(family: str) -> PreTrainedModel:
    return tiny_model(family, seed=3)


@cache
def reference(family: str, i: int) -> list[int]:
    return hf_greedy(family_model(family), PROMPTS[i], MAX_TOKENS[i])


# In the loop nobody's forward holds anybody else, so how many share a step is a matter of the schedule alone.
@pytest.mark.parametrize(("batching", "max_num_seqs"), [*[("padded", size) for size in MAX_NUM_SEQS], ("loop", 5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_families(
    family: str, batching: str, max_num_seqs: int, checkpoint: Checkpoint, oracle_stats: OracleStats
) -> None:
    """Llama-3 RoPE scaling and a window of 8 tokens included. Each way and size of batch meets each policy."""
    policy = POLICIES[(FAMILIES.index(family) + MAX_NUM_SEQS.index(max_num_seqs)) % len(POLICIES)]
    llm = make_llm(checkpoint(family), batching=batching, max_num_seqs=max_num_seqs, scheduling_policy=policy)
    outputs = serve(llm, PROMPTS, [SamplingParams(temperature=0, max_tokens=n) for n in MAX_TOKENS])
    for i, output in enumerate(outputs):
        ours, model = output.outputs[0].token_ids, family_model(family)
        assert_same_tokens(ours, reference(family, i), model, PROMPTS[i], oracle_stats)
        assert output.outputs[0].finish_reason == "length"
    assert llm.engine.stats.max_running == min(max_num_seqs, len(PROMPTS))
    check_forwards(llm, batching)


# ---------------------------------------------------------------------- folo-tiny: text, and M1


@pytest.fixture(scope="module")
def m1() -> LLM:
    return make_llm("folo-tiny", "m1")


@pytest.fixture(scope="module")
def prose(m1: LLM) -> list[str]:
    """Cuts of the bundled prose, from one character to some 200 tokens."""
    text = "\n\n".join(load_prose().values())
    return [text[97 * i : 97 * i + size] for i, size in enumerate((1, 700, 40, 5, 300, 90, 2, 150))]


@pytest.fixture(scope="module")
def m1_outputs(m1: LLM, prose: list[str], oracle_stats: OracleStats) -> list[RequestOutput]:
    """What M1 says, one request at a time, which is what Hugging Face says."""
    outputs = m1.generate(prose, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    model = m1.engine.core.runner.model  # type: ignore[attr-defined]
    for output in outputs:
        expected = hf_greedy(model, output.prompt_token_ids, 16, eos=m1.engine.eos_token_ids)
        assert_same_tokens(output.outputs[0].token_ids, expected, model, output.prompt_token_ids, oracle_stats)
    return outputs


@pytest.mark.parametrize(
    ("batching", "max_num_seqs", "policy"),
    [("padded", 2, "fcfs"), ("padded", 2, "priority"), ("padded", 16, "sjf"), ("loop", 5, "priority")],
)
def test_folo_tiny_says_what_it_says_at_m1(
    batching: str,
    max_num_seqs: int,
    policy: str,
    prose: list[str],
    m1: LLM,
    m1_outputs: list[RequestOutput],
    oracle_stats: OracleStats,
) -> None:
    llm = make_llm("folo-tiny", batching=batching, max_num_seqs=max_num_seqs, scheduling_policy=policy)
    outputs = serve(llm, prose, [SamplingParams(temperature=0, max_tokens=16)] * len(prose))
    model = m1.engine.core.runner.model  # type: ignore[attr-defined]
    for ours, alone in zip(outputs, m1_outputs, strict=True):
        a, b = ours.outputs[0], alone.outputs[0]
        assert_same_tokens(a.token_ids, b.token_ids, model, ours.prompt_token_ids, oracle_stats)
        assert ours.prompt == alone.prompt
        if a.token_ids == b.token_ids:
            assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    assert min(max_num_seqs, 5) <= llm.engine.stats.max_running <= max_num_seqs
    check_forwards(llm, batching)


# ---------------------------------------------------------------------- EOS


@pytest.mark.parametrize("batching", ["padded", "loop"])
def test_an_eos_ends_its_request_while_the_others_go_on(
    batching: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    """Random weights reach an EOS soon if many ids are one."""
    model = tiny_model("qwen3", seed=5)
    eos = list(range(0, 128, 11))
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    llm = make_llm(str(tmp_path), batching=batching, max_num_seqs=5)
    prompts = [random_prompt(length, seed=200 + length) for length in range(1, 21)]
    outputs = serve(llm, prompts, [SamplingParams(temperature=0, max_tokens=24)] * len(prompts))
    ends = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        assert_same_tokens(completion.token_ids, hf_greedy(model, prompt, 24, eos=eos), model, prompt, oracle_stats)
        ends.append(completion.token_ids[-1] in eos)
        assert completion.finish_reason == ("stop" if ends[-1] else "length")
    assert 8 <= sum(ends) < len(prompts)
    stopped = {str(i) for i, end in enumerate(ends) if end}
    steps = list(llm.engine.trace)
    # Somebody stops, and of those beside it the others are there in the next step.
    went_on = [
        {r.request_id for r in step.requests} - set(step.finished) <= {r.request_id for r in after.requests}
        for step, after in pairwise(steps)
        if stopped & set(step.finished) and len(step.requests) > 1
    ]
    assert len(went_on) >= 5 and all(went_on)


# ---------------------------------------------------------------------- seeds and log probabilities


@pytest.mark.parametrize(("family", "batching"), [("qwen3", "padded"), ("mistral", "padded"), ("qwen3", "loop")])
def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(
    family: str, batching: str, checkpoint: Checkpoint
) -> None:
    """Temperature 1, in three kinds of company, samples of one prompt included: each seed as it is alone."""
    alone = make_llm(checkpoint(family), "m1")
    prompts = [random_prompt(n, seed=n) for n in (40, 3, 90, 12, 1)]

    def single(prompt: list[int], seed: int) -> list[int]:
        params = SamplingParams(seed=seed, max_tokens=8)
        return alone.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids

    expected = [[single(prompt, 100 * i + k) for k in range(3)] for i, prompt in enumerate(prompts)]
    assert len({tuple(tokens) for samples in expected for tokens in samples}) == 15
    greedy = SamplingParams(temperature=0, max_tokens=5)
    for max_num_seqs, policy in ((2, "fcfs"), (5, "sjf"), (16, "priority")):
        llm = make_llm(checkpoint(family), batching=batching, max_num_seqs=max_num_seqs, scheduling_policy=policy)
        params = [SamplingParams(n=3, seed=100 * i, max_tokens=8) for i in range(len(prompts))]
        company = [random_prompt(5 + max_num_seqs, seed=max_num_seqs)] * 2
        outputs = serve(llm, [*company, *prompts], [greedy, SamplingParams(max_tokens=9), *params])
        assert [[c.token_ids for c in output.outputs] for output in outputs[2:]] == expected
        assert llm.engine.stats.max_running == max_num_seqs


@pytest.mark.parametrize("batching", ["padded", "loop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_float64_model(family: str, batching: str, checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint(family), batching=batching, max_num_seqs=5)
    prompts = [random_prompt(n, seed=300 + n) for n in (3, 50, 1, 17, 8)]
    outputs = serve(llm, prompts, [SamplingParams(seed=i, max_tokens=6, logprobs=4) for i in range(5)])
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        table = float64_logits(family_model(family), [*prompt, *completion.token_ids]).log_softmax(-1)  # [L, V]
        assert completion.logprobs is not None and len(completion.logprobs) == 6
        total = 0.0
        for k, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            row = table[len(prompt) - 1 + k]
            best = row.topk(4).values
            assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
            ranked = sorted((e.logprob for e in entry.values() if e.rank <= 4), reverse=True)
            assert torch.allclose(torch.tensor(ranked[:4], dtype=torch.float64), best, atol=1e-4)
            total += row[token].item()
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert llm.engine.stats.max_running == 5
