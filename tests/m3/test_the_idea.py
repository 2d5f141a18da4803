"""M3 in ten tests: K/V lies in blocks of one size, and a request takes a block when it has a token to put there.

A table per request names its blocks, which may lie anywhere in the pool and belong to several requests at once. When
no block is free, the newest request gives way. All tokens of a step go through one forward, without padding. This file
is what to read first. The others check it in depth: `test_same_tokens.py` and `test_same_tokens_preempted.py` the text;
`test_block_pool.py` and `test_block_manager.py` the blocks; `test_scheduler_paged.py` who gets them, and
`test_scheduler_machine.py` with random requests; `test_input_batch.py` and `test_attention.py` the forward.
"""

from __future__ import annotations

from math import ceil, nan
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.models.loader import resolve_model
from tests.oracle import hf_greedy

PROMPTS = [[100 + i for i in range(10)], [700 + i for i in range(9)], [40, 30, 20]]
SIZE = 4  # tokens per block


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What Hugging Face says to each prompt."""
    path = resolve_model("folo-tiny").path_or_id
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    return [hf_greedy(model, prompt, 12) for prompt in PROMPTS]


def make_llm(num_kv_blocks: int = 40, **kwargs: Any) -> LLM:
    """M3 with a small pool, and a record of every block in its trace."""
    options = {"max_model_len": 64, "block_size": SIZE, "num_kv_blocks": num_kv_blocks, "trace_blocks": True}
    return LLM("folo-tiny", milestone="m3", dtype="float32", device="cpu", **(options | kwargs))


def params(max_tokens: int = 12, **kwargs: Any) -> SamplingParams:
    """Greedy, and as long as it is asked to be."""
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **kwargs})


def serve(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params(), use_tqdm=False)]


def test_a_request_takes_a_block_when_it_has_a_token_to_put_there() -> None:
    llm = make_llm()
    serve(llm, PROMPTS[:1])
    for step in list(llm.engine.trace)[:-1]:  # in the last one it ends, and holds nothing
        (request,) = step.requests
        assert len(step.blocks.tables["0"]) == ceil(request.num_computed / SIZE)


def test_so_it_never_holds_a_whole_block_more_than_it_uses() -> None:
    llm = make_llm()
    serve(llm)
    for step in llm.engine.trace:
        assert step.kv.reserved - step.kv.used < SIZE * max(1, step.num_running)


def test_blocks_of_a_request_lie_wherever_one_was_free() -> None:
    llm = make_llm()
    serve(llm)
    tables = llm.engine.trace[8].blocks.tables
    assert tables["0"][:3] == (1, 2, 3) and tables["0"][3] > 4  # what comes after its prompt is behind others
    assert len({block for table in tables.values() for block in table}) == sum(map(len, tables.values()))


def test_after_a_run_all_blocks_are_free() -> None:
    llm = make_llm()
    serve(llm)
    last = llm.engine.trace[-1]
    assert last.kv.reserved == 0 and last.blocks.num_free == 40 and last.blocks.tables == {}


def test_the_tokens_are_those_of_hugging_face_generate(expected: list[list[int]]) -> None:
    assert serve(make_llm()) == expected


def test_when_blocks_run_out_the_newest_request_gives_way_and_its_text_is_unchanged(expected: list[list[int]]) -> None:
    llm = make_llm(num_kv_blocks=8)  # together they would come to need 16
    assert serve(llm) == expected
    preempted = [request for step in llm.engine.trace for request in step.preempted]
    assert preempted[0] == "2" and "0" not in preempted


def test_a_request_that_the_whole_pool_could_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="can never run"):
        serve(make_llm(num_kv_blocks=5))


def test_samples_share_the_blocks_of_their_prompt_and_copy_one_when_they_write_into_it() -> None:
    llm = make_llm()
    llm.generate(PROMPTS[:1], params(5, n=3, temperature=1.0, seed=0), use_tqdm=False)
    tables = list(llm.engine.trace[1].blocks.tables.values())
    assert len(tables) == 3
    assert len({table[:2] for table in tables}) == 1  # the first 8 of 10 tokens: two full blocks, once for all
    assert llm.engine.trace[1].blocks.ref_cnt[tables[0][0]] == 3
    assert len({table[2] for table in tables}) == 3  # and the half full one: each has its own
    assert llm.engine.stats.copied_blocks == 2  # the last to write keeps the original


def test_a_step_is_one_forward_without_padding_whatever_the_lengths() -> None:
    llm = make_llm()
    serve(llm)
    assert [r.num_scheduled for r in llm.engine.trace[0].requests] == [10, 9, 3]
    assert llm.engine.stats.forwards == llm.engine.stats.steps and llm.engine.stats.padding_tokens == 0


@pytest.mark.parametrize("whose", ["others", "own"])
def test_a_request_reads_the_blocks_that_its_table_names_and_no_others(whose: str, expected: list[list[int]]) -> None:
    """Spoil all blocks but its own in the middle of a run: it says the same. Spoil one of its own: it does not."""
    llm = make_llm()
    llm.engine.add_request("a", PROMPTS[0], params())
    llm.engine.step()
    own = llm.engine.trace[-1].blocks.tables["a"]
    for layer in llm.engine.core.runner.storage.layers:
        for block in range(1, 41):
            if block == own[0] if whose == "own" else block not in own:
                layer.keys[block] = layer.values[block] = nan if whose == "others" else 0.0
    outputs: list[Any] = []
    while llm.engine.has_unfinished_requests():
        outputs = llm.engine.step()
    assert (outputs[0].outputs[0].token_ids == expected[0]) is (whose == "others")
