"""Promise 1 at M3: greedy output in float32 is Hugging Face `generate`'s, in blocks of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from tests.m3.cases import MODELS, Case
from tests.m3.helpers import check_all_free, manager_of
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

LENGTHS = (1, 2, 7, 8, 9, 31, 33, 60)
BLOCK_SIZES = (1, 8, 16, 32, 256)
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(name, tmp_path_factory.mktemp(name), LENGTHS, 16) for name in MODELS}


@each_model
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_any_block_size_and_backend(
    name: str, block_size: int, cases: dict[str, Case], oracle_stats: OracleStats
) -> None:
    """The backends take turns, so that each of them meets every model and every block size."""
    backend = ("torch", "reference")[(MODELS.index(name) + BLOCK_SIZES.index(block_size)) % 2]
    llm = cases[name].llm(block_size=block_size, attention_backend=backend, num_kv_blocks=-(-400 // block_size))
    cases[name].check(llm, oracle_stats)
    assert llm.engine.stats.max_running > 1 and llm.engine.stats.forwards < sum(map(len, cases[name].expected))


@each_model
def test_all_milestones_say_the_same(name: str, cases: dict[str, Case], oracle_stats: OracleStats) -> None:
    """Not by way of Hugging Face: M1, M2 in both forms and M3 give one text, and log probabilities to rounding."""
    case = cases[name]
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=2)
    settings: list[tuple[str, dict[str, Any]]] = [
        ("m1", {}),
        ("m2", {"batching": "loop"}),
        ("m2", {"batching": "padded"}),
        ("m3", {"num_kv_blocks": 6}),
        ("m3", {"attention_backend": "reference"}),
    ]
    runs = [case.llm(m, **kwargs).generate(case.prompts, params, use_tqdm=False) for m, kwargs in settings]
    for run in runs[1:]:
        for ours, theirs, prompt in zip(run, runs[0], case.prompts, strict=True):
            one, other = ours.outputs[0], theirs.outputs[0]
            assert_same_tokens(one.token_ids, other.token_ids, case.model, prompt, oracle_stats)
            if one.token_ids == other.token_ids:
                assert one.finish_reason == other.finish_reason and one.text == other.text
                assert one.cumulative_logprob is not None and other.cumulative_logprob is not None
                assert abs(one.cumulative_logprob - other.cumulative_logprob) < 1e-3


def test_requests_that_come_while_others_run_and_give_way(cases: dict[str, Case], oracle_stats: OracleStats) -> None:
    """Prefills and decodes of different requests in one forward, at other positions and in other blocks each time."""
    case = cases["llama"]
    llm = case.llm(block_size=4, num_kv_blocks=22, preemption_mode="swap", swap_space=0.01, max_num_batched_tokens=128)
    waiting = list(enumerate(case.prompts))
    done: dict[int, list[int]] = {}
    while waiting or llm.engine.has_unfinished_requests():
        if waiting and (len(waiting) % 2 or len(llm.engine.trace) % 3 == 0):
            index, prompt = waiting.pop(0)
            llm.engine.add_request(str(index), prompt, case.params)
        for output in llm.engine.step():
            if output.finished:
                done[int(output.request_id)] = output.outputs[0].token_ids
        manager_of(llm.engine).check()
    case.compare([done[i] for i in range(len(case.prompts))], oracle_stats)
    assert any(0 < step.num_prefills < len(step.requests) for step in llm.engine.trace)
    assert llm.engine.stats.preemptions > 0
    check_all_free(llm.engine)


def test_eos_ends_an_output_where_hugging_face_ends_it(tmp_path: Path, oracle_stats: OracleStats) -> None:
    """In a batch, while others are preempted. Every id of generation_config's list counts."""
    model = tiny_model("qwen3", seed=5)
    eos = list(range(0, 128, 9))
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone="m3", dtype="float32", device="cpu", block_size=4, num_kv_blocks=20)
    prompts = [random_prompt(length, seed=100 + length) for length in range(1, 21)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    stopped = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        assert_same_tokens(completion.token_ids, hf_greedy(model, prompt, 32, eos=eos), model, prompt, oracle_stats)
        ended = completion.token_ids[-1] in eos
        assert completion.finish_reason == ("stop" if ended else "length")
        stopped += ended
    assert stopped >= 10 and llm.engine.stats.preemptions > 0
    check_all_free(llm.engine)


def test_stop_strings_and_their_blocks(cases: dict[str, Case]) -> None:
    """The text side ends a request after the step; its blocks are free at once, and M1 ends it in the same place."""
    case = cases["folo-tiny"]
    params = SamplingParams(temperature=0, max_tokens=16, stop=["e", "."])
    llm = case.llm(block_size=4, num_kv_blocks=30)
    ours = llm.generate(case.prompts, params, use_tqdm=False)
    theirs = case.llm("m1").generate(case.prompts, params, use_tqdm=False)
    assert [o.outputs[0].text for o in ours] == [o.outputs[0].text for o in theirs]
    assert [o.outputs[0].stop_reason for o in ours] == [o.outputs[0].stop_reason for o in theirs]
    assert sum(o.outputs[0].stop_reason in ("e", ".") for o in ours) > 4
    check_all_free(llm.engine)
