"""M4 in ten tests: a prompt may be computed in chunks beside the decodes, and no prefix is computed twice.

A step gives its decodes a token each, and what is left of the budget to prompts: a long one is split, so nobody who
decodes waits for it. Blocks that are full stay in a cache, found by the tokens in them and before them. This file is
what to read first. The others check it in depth: `test_same_tokens_m4.py` and `test_same_tokens_forked.py` the text;
`test_scheduler_m4.py` the chunks; `test_prefix_cache.py` what is found, and `test_lru.py` what is forgotten;
`test_pending_blocks.py` that only written blocks are found; `test_machine_m4.py` all of it with random requests.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.models.loader import resolve_model
from tests.oracle import hf_greedy

SIZE = 4  # tokens per block
COMMON = [100 + 3 * i for i in range(16)]
PROMPTS = [[*COMMON, 50, 60], [*COMMON, 70], [7, 8, 9], [*COMMON[:9], 80, 90, 95], COMMON]


def make_llm(num_kv_blocks: int = 60, **kwargs: Any) -> LLM:
    """M4 with a small pool, and a record of every block in its trace."""
    options = {"max_model_len": 64, "block_size": SIZE, "num_kv_blocks": num_kv_blocks, "trace_blocks": True}
    return LLM("folo-tiny", milestone="m4", dtype="float32", device="cpu", **(options | kwargs))


def params(max_tokens: int) -> SamplingParams:
    """Greedy, and as long as it is asked to be."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def ask(llm: LLM, prompt: list[int], max_tokens: int = 1) -> int:
    """Run a request to its end, alone; the tokens of its prompt that were found in the cache."""
    (output,) = llm.generate([prompt], params(max_tokens), use_tqdm=False)
    return output.num_cached_tokens


def beside_a_decode(budget: int) -> LLM:
    """A request that decodes, and after its first step another with a prompt of 30 tokens."""
    llm = make_llm(max_num_batched_tokens=budget)
    llm.engine.add_request("decodes", [1, 2, 3], params(12))
    llm.engine.step()
    llm.engine.add_request("long", list(range(100, 130)), params(2))
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    return llm


def computed(llm: LLM, name: str) -> list[int]:
    """How many tokens of a request each step computed that had any."""
    return [r.num_scheduled for step in llm.engine.trace for r in step.requests if r.request_id == name]


# ---------------------------------------------------------------------- chunks


def test_a_long_prompt_is_split_into_what_the_decodes_leave_of_the_budget() -> None:
    llm = beside_a_decode(budget=9)
    assert computed(llm, "long") == [8, 8, 8, 6, 1]  # the last is the decode of its first token
    assert max(step.num_scheduled_tokens for step in llm.engine.trace) == 9


def test_only_the_last_chunk_chooses_a_token() -> None:
    llm = beside_a_decode(budget=9)
    sampled = [r.num_sampled for step in llm.engine.trace for r in step.requests if r.request_id == "long"]
    assert sampled == [0, 0, 0, 1, 1]


def test_who_decodes_gets_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    llm = beside_a_decode(budget=9)
    assert [r.num_sampled for step in llm.engine.trace for r in step.requests if r.request_id == "decodes"] == [1] * 12
    assert all("decodes" in {r.request_id for r in step.requests} for step in list(llm.engine.trace)[:12])


# ---------------------------------------------------------------------- prefixes


def test_a_prompt_that_begins_like_an_earlier_one_computes_only_the_rest() -> None:
    llm = make_llm()
    assert ask(llm, PROMPTS[0]) == 0
    assert ask(llm, PROMPTS[1]) == 16
    assert (llm.engine.stats.cached_tokens, llm.engine.stats.prompt_tokens_computed) == (16, 18 + 1)


def test_only_whole_blocks_are_found_and_only_if_everything_before_them_is_the_same() -> None:
    llm = make_llm()
    ask(llm, COMMON)
    assert ask(llm, [*COMMON[:7], 5]) == 4
    assert ask(llm, [5, *COMMON[1:], 5]) == 0


def test_a_prompt_that_is_found_whole_still_computes_a_token() -> None:
    """K/V alone does not say what comes next: that takes the logits of the last token."""
    llm = make_llm()
    prompt = [*COMMON, 5]
    ask(llm, [*prompt, 6, 7, 8])
    assert ask(llm, prompt) == 16 and computed(llm, "1") == [1]
    assert ask(llm, COMMON) == 12  # a multiple of the block size: then it is the last block


def test_two_that_come_at_once_compute_their_common_prefix_once() -> None:
    llm = make_llm()
    llm.generate(PROMPTS[:2], params(3), use_tqdm=False)
    assert llm.engine.stats.prompt_tokens_computed == 16 + 2 + 1


def test_what_was_used_least_recently_is_forgotten_first_and_a_tail_before_its_head() -> None:
    llm = make_llm(num_kv_blocks=10, max_model_len=40)
    blocks = []
    for start in (100, 300, 500):  # 13 tokens take four blocks, of which three are full and stay in the cache
        ask(llm, [start + i for i in range(13)], max_tokens=2)
        (table,) = llm.engine.trace[-2].blocks.tables.values()
        blocks.append(table)
    first, second, third = blocks  # 12 blocks of 10: the third took two of the first one's, from its end
    assert set(third) & set(first) == {first[3], first[2]}
    assert set(llm.engine.trace[-1].blocks.cached) == {*first[:2], *second[:3], *third[:3]}


def test_a_conversation_finds_what_was_said_before() -> None:
    llm = make_llm()
    (output,) = llm.generate([COMMON], params(9), use_tqdm=False)
    said = [*COMMON, *output.outputs[0].token_ids]
    assert ask(llm, [*said, 5, 6]) == 24  # 16 tokens of the prompt and 8 of the answer, whose last was never fed back


# ---------------------------------------------------------------------- and the text


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What Hugging Face says to each prompt."""
    path = resolve_model("folo-tiny").path_or_id
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    return [hf_greedy(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [5, 8, 64])
def test_chunks_and_cache_change_no_token(budget: int, caching: bool, expected: list[list[int]]) -> None:
    llm = make_llm(max_num_batched_tokens=budget, enable_prefix_caching=caching)
    for _ in range(2):  # the second time, prefixes are found
        outputs = llm.generate(PROMPTS, params(8), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    assert (llm.engine.stats.cached_tokens > 0) is caching
