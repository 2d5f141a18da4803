"""One request's fault never ends another: a step that fails is tried again in parts, at every milestone."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Container
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.engine import llm_engine
from folovllm.messages import SchedulerOutput
from folovllm.outputs import RequestOutput
from folovllm.sampling import sampler
from tests.m4.helpers import cached_engine, kept_llms
from tests.mock import PagedMockRunner, check_empty, mock_tokens, paged_mock_engine
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

MODEL = tiny_model("qwen3", seed=3)
MODES: dict[str, dict[str, Any]] = {
    "m1": {"milestone": "m1"},
    "m2-padded": {"milestone": "m2", "max_num_seqs": 5},
    "m2-loop": {"milestone": "m2", "max_num_seqs": 5, "batching": "loop"},
    "m3": {"milestone": "m3", "max_num_seqs": 5, "num_kv_blocks": 60, "block_size": 4},
    "m3-preempting": {"milestone": "m3", "num_kv_blocks": 14, "block_size": 4},
    "m3-swapping": {"milestone": "m3", "num_kv_blocks": 14, "block_size": 4, "preemption_mode": "swap"},
    "m4": {"milestone": "m4", "num_kv_blocks": 60, "block_size": 4, "max_num_batched_tokens": 16},
    "m4-preempting": {"milestone": "m4", "num_kv_blocks": 14, "block_size": 4, "max_num_batched_tokens": 16},
    "m4-swapping": {"milestone": "m4", "num_kv_blocks": 14, "block_size": 4, "preemption_mode": "swap"},
}
MILESTONES = ["m1", "m2-padded", "m2-loop", "m3", "m4"]


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    MODEL.save_pretrained(folder)
    return kept_llms(folder, MODES, max_model_len=64)


def last_layer(llm: LLM) -> torch.nn.Module:
    model: Any = llm.engine.core.runner.model  # type: ignore[attr-defined]
    return model.layers[-1] if hasattr(model, "layers") else model.model.layers[-1]


class Faults:
    """Makes forwards fail in their last layer, when all others have written their K/V.

    poisoned: request id -> the position from which on every step with this request fails. calls: forwards that fail.
    """

    def __init__(self, llm: LLM, poisoned: dict[str, int] | None = None, calls: Container[int] = ()) -> None:
        self.runner: Any = llm.engine.core.runner
        self.poisoned, self.failing_calls = poisoned or {}, calls
        self.calls = self.raised = self.left = 0
        self.victims: set[str] = set()
        self.layer, self.execute = last_layer(llm), self.runner.execute_model

    def __enter__(self) -> Faults:
        self.hook = self.layer.register_forward_hook(self.after_layer)
        self.runner.execute_model = self.watched
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()
        self.runner.execute_model = self.execute

    def watched(self, step: SchedulerOutput) -> Any:
        shares = step.scheduled
        self.left = len(self.runner.groups(shares)) if hasattr(self.runner, "groups") else 1
        self.victims = {share.request_id for share in shares if share.start >= self.poisoned.get(share.request_id, 999)}
        return self.execute(step)

    def after_layer(self, *args: Any) -> None:
        self.calls += 1
        self.left -= 1
        if self.calls in self.failing_calls or (self.victims and self.left == 0):
            self.raised += 1
            raise RuntimeError(f"cannot compute {sorted(self.victims)}")


def drain(llm: LLM) -> dict[str, RequestOutput]:
    done: dict[str, RequestOutput] = {}
    while llm.engine.has_unfinished_requests():
        done |= {o.request_id: o for o in llm.engine.step() if o.finished}
    return done


def check_nothing_is_held(llm: LLM) -> None:
    usage = llm.engine.core.scheduler.kv.usage()
    assert (usage.reserved, usage.used) == (0, 0)
    runner: Any = llm.engine.core.runner
    assert len(runner.states) == 0
    assert not hasattr(runner, "caches") or len(runner.caches) == 0


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """Prompts of which some begin alike, for the prefix cache."""
    chooser = random.Random(seed)
    common = random_prompt(12, seed=seed)
    return [
        (common[: chooser.choice([0, 0, 8, 12])] + random_prompt(chooser.randint(1, 9), seed=seed + i))
        for i in range(count)
    ]


def add_all(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], leave_out: Container[str] = ()) -> None:
    for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        if str(i) not in leave_out:
            llm.engine.add_request(str(i), {"prompt_token_ids": prompt}, each)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    poisoned=st.dictionaries(st.sampled_from("012345"), st.sampled_from([0, 0, 5, 14]), max_size=3),
    calls=st.sets(st.integers(1, 30), max_size=3),
)
def test_the_others_have_the_tokens_of_hugging_face(
    mode: str,
    seed: int,
    poisoned: dict[str, int],
    calls: set[int],
    llms: Callable[[str], LLM],
    oracle_stats: OracleStats,
) -> None:
    """Six requests, of which some fail from some position on, and some forwards that fail once."""
    llm = llms(mode)
    prompts = prompts_of(seed, 6)
    with Faults(llm, poisoned, calls):
        add_all(llm, prompts, [greedy(6)] * 6)
        done = drain(llm)
    for i, prompt in enumerate(prompts):
        (completion,) = done[str(i)].outputs
        expected = hf_greedy(MODEL, prompt, 6)
        if completion.finish_reason == "error":
            assert str(i) in poisoned or len(calls) + bool(poisoned) > 1  # one failure is not enough to be given up
            assert str(completion.stop_reason).startswith("RuntimeError: cannot compute")
            expected = expected[: len(completion.token_ids)]
        else:
            assert completion.finish_reason == "length"
        assert_same_tokens(completion.token_ids, expected, MODEL, prompt, oracle_stats)
    for i, position in poisoned.items():
        if position == 0 or len(prompts[int(i)]) <= position < len(prompts[int(i)]) + 5:
            assert done[i].outputs[0].finish_reason == "error"
    check_nothing_is_held(llm)


@pytest.mark.parametrize("mode", MODES)
def test_streams_of_random_numbers_advance_only_with_a_token(mode: str, llms: Callable[[str], LLM]) -> None:
    """Seeded requests, penalties and logprobs: what they give without the request at fault, they give beside it."""
    llm = llms(mode)
    prompts = prompts_of(5, 6)
    params = [
        SamplingParams(seed=i, max_tokens=7, ignore_eos=True, frequency_penalty=0.5 * (i % 2), logprobs=i % 3 or None)
        for i in range(6)
    ]
    add_all(llm, prompts, params, leave_out={"1", "4"})
    alone = drain(llm)
    llm.reset_prefix_cache()
    with Faults(llm, {"1": 0, "4": 3}) as faults:
        add_all(llm, prompts, params)
        beside = drain(llm)
    assert faults.raised > 1
    assert [beside[i].outputs[0].finish_reason for i in "14"] == ["error", "error"]
    for i in "0235":
        ours, theirs = beside[i].outputs[0], alone[i].outputs[0]
        assert ours.token_ids == theirs.token_ids and ours.finish_reason == "length"
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
    check_nothing_is_held(llm)


@pytest.mark.parametrize("mode", ["m2-padded", "m3", "m4"])
def test_a_sampler_that_fails_has_drawn_nothing(
    mode: str, llms: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when it has drawn: the repeat draws the same numbers, also for a request without a seed."""
    llm = llms(mode)
    prompts, params = prompts_of(7, 1), [SamplingParams(max_tokens=8, ignore_eos=True, seed=None)]
    for seeded in (False, True):
        params = [SamplingParams(max_tokens=8, ignore_eos=True, seed=3 if seeded else None)]
        texts = []
        for failing in (False, True):
            llm.engine._num_unseeded = 0  # so that the request gets the same seed of its own
            draw, calls = sampler._draw, []

            def failing_draw(*args: Any, draw: Any = draw, calls: list[int] = calls) -> Any:
                result = draw(*args)
                calls.append(1)
                if len(calls) % 2:
                    raise MemoryError
                return result

            with monkeypatch.context() as patch:
                if failing:
                    patch.setattr(sampler, "_draw", failing_draw)
                add_all(llm, prompts, params)
                texts.append(drain(llm)["0"].outputs[0].token_ids)
        assert texts[0] == texts[1] and len(texts[0]) == 8


@pytest.mark.parametrize("mode", ["m2-padded", "m3", "m3-swapping", "m4"])
def test_samples_of_a_prompt_do_not_fail_with_their_leader(mode: str, llms: Callable[[str], LLM]) -> None:
    llm = llms(mode)
    params = SamplingParams(n=4, seed=1, max_tokens=6, ignore_eos=True)
    prompt = prompts_of(9, 1)[0]
    llm.engine.add_request("s", {"prompt_token_ids": prompt}, params)
    alone = drain(llm)["s"].outputs
    llm.reset_prefix_cache()
    with Faults(llm, {"s/0": 0, "s/2": len(prompt) + 1}):
        llm.engine.add_request("s", {"prompt_token_ids": prompt}, params)
        llm.engine.add_request("t", {"prompt_token_ids": prompt}, params)
        done = drain(llm)
    assert [c.finish_reason for c in done["s"].outputs] == ["error", "length", "error", "length"]
    for i in (1, 3):
        assert done["s"].outputs[i].token_ids == alone[i].token_ids
    assert [c.token_ids for c in done["t"].outputs] == [c.token_ids for c in alone]
    check_nothing_is_held(llm)


@pytest.mark.parametrize("mode", MILESTONES)
def test_a_beam_search_that_cannot_go_on_says_why_and_leaves_the_others(mode: str, llms: Callable[[str], LLM]) -> None:
    llm = llms(mode)
    prompt, other = prompts_of(4, 2)
    llm.engine.add_request("other", {"prompt_token_ids": other}, greedy(6))
    first = llm.engine._next_id
    search = {str(i): 0 for i in range(first + 5, first + 50)}  # two ids for checks, one in the first round, then two
    with Faults(llm, search), pytest.raises(RuntimeError, match="beam search has no tokens: RuntimeError: cannot comp"):
        llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(2, 8))
    assert drain(llm)["other"].outputs[0].token_ids == hf_greedy(MODEL, other, 6)
    check_nothing_is_held(llm)
    again = llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(2, 8))
    assert len(again[0].sequences) == 2


@pytest.mark.parametrize("mode", MILESTONES)
def test_a_lost_device_ends_all_with_one_message_and_is_not_tried_again(mode: str, llms: Callable[[str], LLM]) -> None:
    llm = llms(mode)
    prompts = prompts_of(3, 6)
    runner: Any = llm.engine.core.runner
    execute, calls = runner.execute_model, []

    def lost(step: SchedulerOutput) -> Any:
        calls.append(step)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    add_all(llm, prompts, [greedy(6)] * 6)
    llm.engine.step()
    runner.execute_model = lost
    done = drain(llm)
    runner.execute_model = execute
    assert len(calls) == 1 and len(done) == 6
    reasons = {(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in done.values()}
    assert reasons == {("error", "AcceleratorError: CUDA error: an illegal memory access was encountered")}
    with pytest.raises(RuntimeError, match="this engine has stopped: AcceleratorError: CUDA error: an illegal"):
        llm.generate([[1, 2]], greedy(2), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()
    llm.engine.core.failure = None  # so that other tests can go on with this engine
    assert llm.generate([prompts[0]], greedy(6), use_tqdm=False)[0].outputs[0].token_ids == hf_greedy(
        MODEL, prompts[0], 6
    )


@pytest.mark.parametrize("mode", MILESTONES)
def test_a_lack_of_memory_that_stays_ends_one_step_and_not_the_engine(mode: str, llms: Callable[[str], LLM]) -> None:
    llm = llms(mode)
    prompts = prompts_of(3, 3)
    with Faults(llm, calls=range(1, 50)) as faults:
        add_all(llm, prompts, [greedy(4)] * 3)
        assert {o.outputs[0].finish_reason for o in drain(llm).values()} == {"error"}
    assert faults.raised <= 3 * len(prompts)  # a whole, its halves, and so on, and each alone twice
    outputs = llm.generate(prompts, greedy(4), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [hf_greedy(MODEL, prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("mode", MILESTONES)
def test_a_tokenizer_that_fails_on_one_request_ends_that_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(milestone=mode[:2], dtype="float32", device="cpu", num_kv_blocks=600, max_model_len=64)
    add = llm_engine.RequestState.add

    def failing(self: Any, output: Any) -> bool:
        if self.request_id == "1":
            raise OverflowError("no such id")
        return add(self, output)

    monkeypatch.setattr(llm_engine.RequestState, "add", failing)
    for i in "012":
        llm.engine.add_request(i, "What is a KV cache?", greedy(5))
    done = drain(llm)
    assert {i: o.outputs[0].finish_reason for i, o in done.items()} == {"0": "length", "1": "error", "2": "length"}
    assert done["1"].outputs[0].stop_reason == "OverflowError: no such id"
    check_nothing_is_held(llm)


# ---------------------------------------------------------------------- K/V that was to be read, and was not written


def test_a_request_that_shares_a_prefix_with_one_that_fails_computes_it_itself() -> None:
    """ "b" hits the blocks that "a" writes in the same step. "a" fails, so there is nothing in them."""
    engine = cached_engine(num_blocks=32, block_size=4)
    runner = engine.core.runner
    assert isinstance(runner, PagedMockRunner)
    prompt, params = list(range(1, 12)), SamplingParams(max_tokens=5, ignore_eos=True)
    execute = runner.execute_model

    def poisoned(step: SchedulerOutput) -> Any:
        if any(share.request_id == "a" for share in step.scheduled):
            raise RuntimeError("poison")
        return execute(step)

    runner.execute_model = poisoned  # type: ignore[method-assign]
    engine.add_request("a", prompt, params)
    engine.add_request("b", [*prompt[:8], 40], params)
    engine.add_request("c", [*prompt[:8], 41], params)
    done = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert done["a"].finish_reason == "error"
    for name, last in (("b", 40), ("c", 41)):
        assert done[name].token_ids == mock_tokens([*prompt[:8], last], params)[0]
    assert list(engine.trace[0].preempted) == ["c", "b"] and engine.trace[1].requests[0].request_id == "b"
    check_empty(engine)


# ---------------------------------------------------------------------- interrupts between any two lines


def interrupted_at(line: int, function: Callable[[], Any]) -> bool:
    """Call a function, with an interrupt at the nth line that it runs of the scheduler. Whether it came to that."""
    left = line

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in ("scheduler.py", "parallel_sampling.py", "core.py"):
            return None if event == "call" else trace
        if event == "line" and left > 0 and frame.f_code.co_name != "undo_step":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_an_interrupt_leaves_nothing_behind(mode: str) -> None:
    """At every line of a step, with requests that go on, finish, fork and fail."""
    line, interrupted = 0, True
    while interrupted:
        line += 1
        engine = paged_mock_engine(num_blocks=24, block_size=4, num_host_blocks=8, preemption_mode=mode)
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        engine.add_request("goes on", [1, 2, 3], params)
        engine.add_request("ends", [4, 5], SamplingParams(max_tokens=1))
        engine.add_request("forks", [6, 7, 8], SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True))
        engine.add_request("fails", [9], params)
        engine.core.runner.failing = {"fails"}  # type: ignore[attr-defined]
        interrupted = interrupted_at(line, engine.step)
        sys.settrace(None)
        for _ in range(60):
            if not engine.has_unfinished_requests():
                break
            engine.step()
        assert not engine.has_unfinished_requests(), line
        engine.core.abort_requests([])
        check_empty(engine)
    assert line > 60
