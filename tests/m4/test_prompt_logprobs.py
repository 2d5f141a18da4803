"""prompt_logprobs at every milestone: Hugging Face's log_softmax of the prompt, once, whatever shares the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm import LLM, SamplingParams
from folovllm.messages import SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.runner.sampling_states import PROMPT_ROWS
from tests.m4.helpers import kept_llms
from tests.oracle import hf_greedy, random_prompt, tiny_model

MODEL = tiny_model("qwen3", seed=3)
VOCAB_SIZE = 128
MODES: dict[str, dict[str, Any]] = {
    "m1": {"milestone": "m1"},
    "m2-padded": {"milestone": "m2", "max_num_seqs": 5},
    "m2-loop": {"milestone": "m2", "max_num_seqs": 5, "batching": "loop"},
    "m3": {"milestone": "m3", "max_num_seqs": 5, "num_kv_blocks": 200, "block_size": 4},
    "m3-preempting": {"milestone": "m3", "num_kv_blocks": 14, "block_size": 4},
    "m4": {"milestone": "m4", "num_kv_blocks": 200, "block_size": 4, "max_num_batched_tokens": 16},
    "m4-preempting": {"milestone": "m4", "num_kv_blocks": 14, "block_size": 4, "max_num_batched_tokens": 7},
    "m4-swapping": {"milestone": "m4", "num_kv_blocks": 14, "block_size": 4, "preemption_mode": "swap"},
}
MILESTONES = ["m1", "m2-padded", "m2-loop", "m3", "m4"]


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    MODEL.save_pretrained(folder)
    return kept_llms(folder, MODES, max_model_len=200)


@torch.no_grad()
def hf_table(token_ids: list[int]) -> torch.Tensor:
    """Row i has the log probabilities of token i + 1, [P, V]."""
    return MODEL(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)


def check(output: RequestOutput, k: int) -> None:
    """All entries of an output are what Hugging Face's log_softmax says."""
    ids, found = output.prompt_token_ids, output.prompt_logprobs
    assert found is not None and len(found) == len(ids) and found[0] is None
    table = hf_table(ids)
    order = table.argsort(dim=-1, descending=True)
    ranks = order.argsort(dim=-1) + 1
    for token_id, entries, row, by_rank, rank in zip(
        ids[1:], found[1:], table.tolist(), order.tolist(), ranks.tolist(), strict=False
    ):
        assert entries is not None and next(iter(entries)) == token_id
        assert set(entries) == {token_id, *by_rank[: VOCAB_SIZE if k == -1 else k]}
        for i, entry in entries.items():
            assert abs(entry.logprob - row[i]) < 2e-4
            assert entry.rank == rank[i]


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, "prompt_logprobs": 2} | fields)


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MILESTONES)
@pytest.mark.parametrize("k", [0, 1, 5, -1])
def test_the_values_are_those_of_hugging_face(llms: Callable[[str], LLM], mode: str, k: int) -> None:
    """Beside requests that do not ask, and in chunks at M4."""
    prompts = [random_prompt(n, seed=n) for n in (1, 2, 9, 30, 21)]
    params = [greedy(prompt_logprobs=k) if n != 2 else greedy(prompt_logprobs=None) for n in range(5)]
    outputs = llms(mode).generate(prompts, params, use_tqdm=False)
    assert outputs[2].prompt_logprobs is None
    for output in (*outputs[:2], *outputs[3:]):
        check(output, k)
        assert output.outputs[0].token_ids == hf_greedy(MODEL, output.prompt_token_ids, 4)


@pytest.mark.parametrize("mode", ["m1", "m2-padded", "m4"])
def test_a_prompt_of_more_rows_than_the_head_takes_at_a_time(llms: Callable[[str], LLM], mode: str) -> None:
    prompt = random_prompt(2 * PROMPT_ROWS + 5, seed=1)
    params = greedy(logprobs=1)
    other, output = llms(mode).generate([random_prompt(7), prompt], [greedy(), params], use_tqdm=False)
    check(output, 2)
    check(other, 2)
    assert output.outputs[0].token_ids == hf_greedy(MODEL, prompt, 4)


@pytest.mark.parametrize("mode", ["m3-preempting", "m4-preempting", "m4-swapping"])
@settings(max_examples=15, deadline=None, database=None)
@given(data=st.data())
def test_requests_that_are_preempted_report_each_token_once(
    llms: Callable[[str], LLM], mode: str, data: st.DataObject
) -> None:
    common = random_prompt(12, seed=7)
    each = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(-1, 2)), min_size=1))
    prompts = [common[:shared] + random_prompt(own, seed=own) for shared, own, _ in each[:6]]
    params = [greedy(max_tokens=16, prompt_logprobs=None if k == -1 else k) for _, _, k in each[:6]]
    llm = llms(mode)
    for output, asked in zip(llm.generate(prompts, params, use_tqdm=False), params, strict=True):
        if asked.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            check(output, asked.prompt_logprobs)
            assert output.num_cached_tokens == 0


def test_preemptions_happen(llms: Callable[[str], LLM]) -> None:
    for mode in ("m3-preempting", "m4-preempting", "m4-swapping"):
        llm = llms(mode)
        outputs = llm.generate([random_prompt(18, seed=i) for i in range(5)], greedy(max_tokens=16), use_tqdm=False)
        assert llm.engine.stats.preemptions > 0
        for output in outputs:
            check(output, 2)


# --- the prefix cache --------------------------------------------------------------------------------------


def test_the_prefix_cache_is_written_and_not_read(llms: Callable[[str], LLM]) -> None:
    llm, prompt = llms("m4"), random_prompt(13, seed=2)
    plain = greedy(prompt_logprobs=None)
    (asks,) = llm.generate([prompt], greedy(), use_tqdm=False)
    (again,) = llm.generate([prompt], plain, use_tqdm=False)
    assert (asks.num_cached_tokens, again.num_cached_tokens) == (0, 12)
    (asks,) = llm.generate([prompt], greedy(), use_tqdm=False)
    assert asks.num_cached_tokens == 0
    check(asks, 2)


def test_blocks_that_another_request_of_the_step_writes_are_not_read(llms: Callable[[str], LLM]) -> None:
    llm, prompt = llms("m4"), random_prompt(7, seed=2)
    plain = greedy(prompt_logprobs=None)
    outputs = llm.generate([prompt, prompt, prompt], [plain, greedy(), plain], use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [0, 0, 4]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    check(outputs[1], 2)


# --- samples, streams, failures ----------------------------------------------------------------------------


@contextmanager
def head_rows(llm: LLM) -> Iterator[list[int]]:
    """The rows of logits that each call of the LM head computes."""
    model: Any = llm.engine.core.runner.model  # type: ignore[attr-defined]
    rows: list[int] = []
    head = model.head if hasattr(model, "head") else model.lm_head
    hook = head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // VOCAB_SIZE))
    yield rows
    hook.remove()


@pytest.mark.parametrize("mode", MILESTONES)
def test_samples_of_a_prompt_share_one_list(llms: Callable[[str], LLM], mode: str) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=3, prompt_logprobs=2)
    prompt = random_prompt(20, seed=5)
    llm = llms(mode)
    with head_rows(llm) as rows:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    check(output, 2)
    assert len(output.outputs) == 3
    if not mode.startswith("m2"):  # there the samples run in the same step
        assert sum(rows) <= 20 + 3 * 3


@pytest.mark.parametrize("mode", MILESTONES)
def test_the_head_takes_a_bounded_number_of_rows(llms: Callable[[str], LLM], mode: str) -> None:
    llm = llms(mode)
    prompts = [random_prompt(60 + i, seed=i) for i in range(4)]
    with head_rows(llm) as rows:
        llm.generate(prompts, greedy(max_tokens=1), use_tqdm=False)
    assert 3 < max(rows) <= PROMPT_ROWS
    with head_rows(llm) as rows:
        llm.generate(prompts, greedy(max_tokens=1, prompt_logprobs=None), use_tqdm=False)
    assert sum(rows) == len(prompts)  # no row of the prompt where nobody asks


@pytest.mark.parametrize("mode", ["m1", "m4"])
def test_a_stream_has_them_from_its_first_output_on(llms: Callable[[str], LLM], mode: str) -> None:
    outputs = list(llms(mode).stream([random_prompt(40, seed=1)], greedy()))
    assert len(outputs) == 4
    for output in outputs:
        check(output, 2)


@pytest.mark.parametrize("mode", MILESTONES)
def test_a_step_that_is_repeated_reports_once(
    llms: Callable[[str], LLM], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler fails in every step that has more than one request, or once if there is one."""
    llm = llms(mode)
    runner: Any = llm.engine.core.runner
    sample, failed = runner.states.sample, []

    def fails(scheduled: Any, logits: Any) -> Any:
        if len(scheduled) > 1 or not failed:
            failed.append(len(scheduled))
            raise RuntimeError("now and then")
        return sample(scheduled, logits)

    monkeypatch.setattr(runner.states, "sample", fails)
    for output in llm.generate([random_prompt(n, seed=n) for n in (11, 30, 6)], greedy(), use_tqdm=False):
        assert output.outputs[0].finish_reason == "length"
        check(output, 2)
    assert failed


def test_a_leader_that_fails_leaves_the_prompt_to_the_next(
    llms: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in MILESTONES:
        llm = llms(mode)
        runner: Any = llm.engine.core.runner
        execute = type(runner).execute_model

        def fails(step: SchedulerOutput, runner: Any = runner, execute: Any = execute) -> Any:
            if any(share.request_id.endswith("/0") for share in step.scheduled):
                raise RuntimeError("the leader's")
            return execute(runner, step)

        with monkeypatch.context() as patched:
            patched.setattr(runner, "execute_model", fails)
            params = SamplingParams(n=3, seed=1, max_tokens=3, prompt_logprobs=2)
            (output,) = llm.generate([random_prompt(40, seed=5)], params, use_tqdm=False)
        assert [c.finish_reason for c in output.outputs] == ["error", "length", "length"]
        check(output, 2)


def test_a_request_that_ends_before_its_prompt_is_computed_has_none(llms: Callable[[str], LLM]) -> None:
    engine = llms("m4").engine
    engine.add_request("a", random_prompt(40, seed=1), greedy())
    assert engine.step() == []
    (output,) = engine.abort_request("a")
    assert output.prompt_logprobs is None


# --- texts, and what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("milestone", ["m1", "m2", "m3", "m4"])
def test_the_texts_of_the_prompt_joined_are_the_prompt(milestone: str) -> None:
    llm = LLM("folo-tiny", milestone=milestone, max_model_len=256, num_kv_blocks=64)
    messages = [{"role": "user", "content": "What is a KV cache? Naïve 🙂 question"}]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    for output in llm.chat(messages, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        chosen = [
            entries[i] for i, entries in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True) if entries
        ]
        text = llm.get_tokenizer().decode(output.prompt_token_ids)
        first = llm.get_tokenizer().decode(output.prompt_token_ids[:1])
        assert first + "".join(str(entry.decoded_token) for entry in chosen) == text
        assert all(entry.decoded_token is not None for e in output.prompt_logprobs if e for entry in e.values())


def test_a_prompt_that_is_cut_has_as_many_entries_as_tokens(llms: Callable[[str], LLM]) -> None:
    (output,) = llms("m4").generate([random_prompt(30)], greedy(truncate_prompt_tokens=12), use_tqdm=False)
    assert len(output.prompt_token_ids) == 12
    check(output, 2)


@pytest.mark.parametrize("value", [-2, 1.5, True, "1", float("nan"), [1]])
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt_logprobs=.*allowed"):
        SamplingParams(prompt_logprobs=value)


def test_more_than_the_vocabulary_is_refused_by_name(llms: Callable[[str], LLM]) -> None:
    for mode in MILESTONES:
        with pytest.raises(ValueError, match=f"prompt_logprobs=129 .*{VOCAB_SIZE}"):
            llms(mode).generate([[1, 2]], greedy(prompt_logprobs=129), use_tqdm=False)
        (output,) = llms(mode).generate([[1, 2]], greedy(prompt_logprobs=128), use_tqdm=False)
        check(output, 128)
